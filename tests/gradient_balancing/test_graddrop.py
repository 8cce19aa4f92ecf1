"""GradDrop on parameters and on features: numbers by hand, expectation, precision, state."""

import pytest
import torch
from torch.testing import assert_close

from dbmtl import Balancer, Identity
from dbmtl.gradient_balancing.graddrop import GradDrop, GradDropFeatures, batch_signs, sign_masks

D = torch.float64


def test_graddrop_keeps_what_all_agree_on_for_every_random_number():
    for sign in (-1.0, 1.0):
        for u in (0.0, 0.5, 1 - 2**-24):
            masks = sign_masks([torch.tensor([sign]), torch.tensor([3 * sign])], torch.tensor([u]))
            assert torch.stack(masks).all()
    assert not torch.stack(sign_masks([torch.zeros(1)] * 2, torch.zeros(1))).any()


def test_graddrop_random_numbers_do_not_follow_the_default_type(draw):
    g = [[row] for row in draw(3, 200, seed=15)]
    sent = [row[0].view(1, -1) for row in g]
    a = draw(1, 200, seed=16)
    single = GradDrop(seed=4)(g, None), GradDropFeatures(seed=4)(sent, None, [a] * 3)
    torch.set_default_dtype(D)
    try:
        double = GradDrop(seed=4)(g, None), GradDropFeatures(seed=4)(sent, None, [a] * 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(double, single, rtol=0, atol=0)


def test_graddrop_by_hand():
    G = [[torch.tensor([1.0, 2.0, -1.0, 0.0])], [torch.tensor([2.0, -1.0, -3.0, 0.0])]]
    directions = torch.stack([GradDrop(seed=s)(G, None)[0] for s in range(400)])
    assert_close(directions[:, [0, 2, 3]], torch.tensor([3.0, -4.0, 0.0]).expand(400, 3))
    up = directions[:, 1] == 2.0
    assert (up | (directions[:, 1] == -1.0)).all()
    assert abs(up.double().mean() - 2 / 3) < 5 * (2 / 9 / 400) ** 0.5


def test_graddrop_is_unbiased_with_variance_of_the_conflict(draw):
    g = draw(3, 1, seed=11)
    p = g.clamp(min=0).sum()
    m = -g.clamp(max=0).sum()
    assert p > 0 and m > 0
    many = GradDrop(seed=0)([[x.expand(100_000)] for x in g], None)[0]
    assert abs(many.mean() - g.sum()) < 5 * (p * m / 1e5).sqrt()
    assert_close(many.var(), p * m, rtol=0.05, atol=0)


def test_graddrop_leak():
    G = [[torch.tensor([4.0])], [torch.tensor([-4.0])]]
    directions = {GradDrop((0.25, 0.5), seed=s)(G, None)[0].item() for s in range(30)}
    # either task 1 whole and half of task 2, or a quarter of 1 and 2 whole
    assert directions == {4 - 0.5 * 4, 0.25 * 4 - 4}
    with pytest.raises(ValueError, match="3 numbers for 2 tasks"):
        GradDrop([0, 0, 0])(G, None)


def test_graddrop_leaks_of_a_step_are_those_of_its_tasks():
    """The first task is missing, and the gradients of the other two are never dropped."""
    theta = torch.nn.Parameter(torch.zeros(100))
    aggregator = GradDrop(leak=(0.0, 1.0, 1.0), seed=0)
    balancer = Balancer(Identity(), aggregator, shared=[theta], num_tasks=3)
    balancer.backward([None, 4 * theta.sum(), -theta.sum()])
    assert_close(theta.grad, torch.full((100,), 3.0))


def test_graddrop_does_not_depend_on_precision_or_partition(draw):
    flat = draw(4, 100, seed=12)
    whole = GradDrop(seed=1)([[g] for g in flat], None)[0]
    parts = GradDrop(seed=1)([[g[:7], g[7:63].view(8, 7), g[63:]] for g in flat], None)
    assert [p.shape for p in parts] == [(7,), (8, 7), (37,)]
    assert_close(torch.cat([p.flatten() for p in parts]), whole, rtol=0, atol=0)
    single = GradDrop(seed=1)([[g.float()] for g in flat], None)[0]
    assert single.dtype == torch.float32
    assert_close(single.double(), whole, rtol=1e-5, atol=1e-6)
    shuffled = GradDrop(seed=1)([[g] for g in flat[[2, 0, 3, 1]]], None)[0]
    assert_close(shuffled, whole)
    double = GradDrop(seed=1)([[g] for g in 2 * flat], None)[0]
    assert_close(double, 2 * whole)


def test_graddrop_sums_half_precision_in_single():
    # the sizes sum to more than 65504
    G = [[torch.full((4000,), 60_000.0).half()], [torch.full((4000,), -6_000.0).half()]]
    up = (GradDrop(seed=0)(G, None)[0] > 0).double().mean()
    assert abs(up - 10 / 11) < 5 * (10 / 121 / 4000) ** 0.5


def test_graddrop_eps_makes_small_gradients_uncertain():
    G = [[torch.full((1000,), 1e-9)], [torch.full((1000,), 2e-9)]]
    assert (GradDrop(seed=0)(G, None)[0] > 0).all()
    features = [torch.ones(1, 1000)] * 2
    sent = [g[0][None] for g in G]
    for drop, expected in (
        (GradDropFeatures(seed=0), 0.5 * (1 + 3 / 103)),
        (GradDropFeatures(eps=0, seed=0), 1.0),
    ):
        kept = (drop(sent, None, features)[0] > 0).double().mean()
        assert abs(kept - expected) < 5 * 0.5 / 1000**0.5 * (expected < 1) + 1e-12


def test_graddrop_edges_and_state(draw):
    one_task = [[torch.tensor([1.0, -2.0, 0.0])]]
    assert_close(GradDrop()(one_task, None), one_task[0])
    assert_close(GradDrop()([[torch.zeros(3)]] * 2, None), [torch.zeros(3)])
    for scale in (1e-30, 1e30):
        assert GradDrop()([[draw(9) * scale], [draw(9, seed=1) * scale]], None)[0].isfinite().all()
    G = [[g] for g in draw(3, 20, seed=13)]
    kept = [[x.clone() for x in row] for row in G]
    a = GradDrop()
    b = GradDrop()
    first = a(G, None)[0]
    b.load_state_dict(a.state_dict())
    second = a(G, None)[0]
    assert_close(b(G, None)[0], second, rtol=0, atol=0)
    assert not torch.equal(first, second)
    assert_close(G, kept, rtol=0, atol=0)


def test_graddrop_features_by_hand():
    a = torch.tensor([[1.0, 3.0], [-1.0, 0.0]])
    sent = [torch.tensor([[2.0, 1.0], [3.0, 5.0]]), torch.tensor([[1.0, 2.0], [-1.0, -9.0]])]
    # feature 1: votes 2 - 3 = -1 and 1 + 1 = 2, purity 2/3
    # feature 2: votes 1 and 2, all positive; its zero has no vote
    heard = torch.stack(
        [torch.stack(GradDropFeatures(seed=s)(sent, None, [a, a])) for s in range(400)]
    )
    assert_close(heard[:, :, :, 1], torch.stack(sent)[:, :, 1].expand(400, 2, 2))
    second = heard[:, 1, 0, 0] == 1
    of_second = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    of_first = torch.tensor([[2.0, 3.0], [0.0, 0.0]])
    assert_close(heard[second][:, :, :, 0], of_second.expand(int(second.sum()), 2, 2))
    assert_close(heard[~second][:, :, :, 0], of_first.expand(int((~second).sum()), 2, 2))
    assert abs(second.double().mean() - 2 / 3) < 5 * (2 / 9 / 400) ** 0.5


def test_graddrop_features_votes_count_the_sign_of_a_feature_not_its_size():
    a = torch.tensor([[3.0], [-1.0], [0.0]])
    assert_close(batch_signs([torch.tensor([[1.0], [2.0], [9.0]])], [a]), [torch.tensor([-1.0])])


def test_graddrop_features_dead_feature_is_dropped_and_leak_lets_it_through():
    a = torch.zeros(3, 2)
    sent = [torch.ones(3, 2), -torch.ones(3, 2)]
    assert_close(GradDropFeatures()(sent, None, [a, a]), [torch.zeros(3, 2)] * 2)
    assert_close(GradDropFeatures((0.5, 1.0))(sent, None, [a, a]), [0.5 * sent[0], sent[1]])


def test_graddrop_features_of_their_own_for_each_task():
    features = [torch.ones(2, 1), -torch.ones(2, 1)]
    sent = [torch.ones(2, 1), torch.ones(2, 1)]  # votes 2 and -2: one of the two is kept, not both
    kept = torch.stack(
        [torch.stack(GradDropFeatures(seed=s)(sent, None, features)).sum() for s in range(20)]
    )
    assert_close(kept, torch.full((20,), 2.0))


@pytest.mark.parametrize("shapes", [((4, 3), (4, 2)), ((4, 3), (5, 3)), ((), ())])
def test_graddrop_features_shapes(shapes):
    features = [torch.ones(s) for s in shapes]
    drop = GradDropFeatures(seed=0)
    before = drop.state_dict()["_extra_state"]["streams"]
    with pytest.raises(ValueError, match="one shape"):
        drop([f.clone() for f in features], None, features)
    assert drop.state_dict()["_extra_state"]["streams"] == before == {}


@pytest.mark.parametrize(
    "method, options, argument",
    [
        (GradDrop, {"leak": -0.1}, "leak"),
        (GradDrop, {"leak": []}, "leak"),
        (GradDrop, {"leak": None}, "leak"),
        (GradDrop, {"leak": [None, 0.1]}, "leak"),
        (GradDrop, {"leak": "ab"}, "leak"),
        (GradDrop, {"leak": float("nan")}, "leak"),
        (GradDrop, {"eps": -1}, "eps"),
        (GradDrop, {"eps": float("inf")}, "eps"),
        (GradDropFeatures, {"leak": [0.1, 2]}, "leak"),
        (GradDropFeatures, {"leak": None}, "leak"),
        (GradDropFeatures, {"eps": -1}, "eps"),
        (GradDropFeatures, {"eps": None}, "eps"),
    ],
)
def test_options_out_of_range_are_named(method, options, argument):
    with pytest.raises(ValueError, match=argument):
        method(**options)
