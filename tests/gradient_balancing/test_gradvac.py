"""GradVac: numbers by hand, groups, averages, its bound, duplicate tasks, state."""

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.gramian import gramian
from dbmtl.gradient_balancing.gradvac import GradVac, vaccinate
from dbmtl.gradient_balancing.pcgrad import visits
from dbmtl.registry import make_balancer

D = torch.float64


def test_gradvac_reaches_the_usual_cosine(float64, gram):
    G = float64([1, 0], [0, 1])
    rho = torch.full((2, 2), 0.6, dtype=D)
    C, after = vaccinate(gram(G), visits(2), rho, beta=0.25)
    assert_close(C, float64([1, 0.75], [0.75, 1]))
    assert_close(after, float64([0.6, 0.45], [0.45, 0.6]))
    assert_close(torch.cosine_similarity(C @ G, G.flip(0)), torch.full((2,), 0.6, dtype=D))


def test_gradvac_update_below_learns_from_corrected_pairs_alone(float64, gram):
    G = float64([1, 0], [1, 1])
    rho = torch.zeros(2, 2, dtype=D)
    assert_close(vaccinate(gram(G), visits(2), rho, update="below")[1], rho)
    assert_close(vaccinate(gram(G), visits(2), rho)[1][0, 1].item(), 0.5 * 0.5**0.5)
    G = float64([1, 0], [-1, 1])
    after = vaccinate(gram(G), visits(2), rho, update="below")[1]
    assert_close(after[0, 1].item(), -0.5 * 0.5**0.5)


def test_gradvac_sees_each_pair_as_left_by_the_visit_before(float64, gram):
    G = float64([1, 0, 0], [-1, 1, 0], [-1, 0, 1])
    # g1' = (.5, .5, 0) after task 2; its cosine with g3 is -.5
    C, rho = vaccinate(gram(G), visits(3), torch.zeros(3, 3, dtype=D), beta=1.0)
    assert_close(rho[0], float64(0, -(0.5**0.5), -0.5))
    assert_close(C[0], float64(1, 0.5, 0.25))


def test_gradvac_groups(draw):
    steps = draw(5, 3, 4, 6, seed=8, mean=-0.1)  # step, tensor, task, coordinate
    tensor = GradVac(group="tensor", order="fixed")
    labels = GradVac(group=["x", "y", "x"], order="fixed")
    each = [GradVac(order="fixed") for _ in range(3)]
    x = GradVac(order="fixed")
    y = GradVac(order="fixed")
    assert x.at_features and not (tensor.at_features or labels.at_features)
    for grads in steps:
        M = grads @ grads.mT
        of_each = [method(m, None) for method, m in zip(each, M, strict=True)]
        assert_close(tensor(M, None, [0, 1, 2]), torch.stack(of_each, 1))
        w = labels(M, None, [0, 1, 2])
        assert_close(w, torch.stack([x(M[0] + M[2], None), y(M[1], None), w[:, 0]], 1))
        assert_close(w[:, 2], w[:, 0])


def test_gradvac_keeps_the_average_of_a_tensor_that_is_missing_for_a_step(draw):
    steps = draw(3, 2, 4, 6, seed=9, mean=-0.1)
    vac = GradVac(group="tensor", order="fixed")
    alone = GradVac(order="fixed")
    for grads, positions in zip(steps, ([0, 1], [1], [0, 1]), strict=True):
        M = (grads @ grads.mT)[positions]
        weights = vac(M, None, positions)
        if 0 in positions:
            assert_close(weights[:, 0], alone(M[0], None))


def test_gradvac_state_goes_on_bit_by_bit(draw, gram):
    steps = draw(8, 5, 5, seed=10, mean=-0.3)
    a = GradVac()
    b = GradVac()
    for G in steps[:4]:
        a(gram(G), None)
    b.load_state_dict(a.state_dict())
    for G in steps[4:]:
        assert_close(b(gram(G), None), a(gram(G), None), rtol=0, atol=0)


def test_gradvac_zero_and_cancelled_gradients_teach_nothing(float64, gram):
    vac = GradVac(order="fixed")
    vac(gram(float64([1, 0], [1, 1], [0, 2])), None)
    before = vac.memory["rho"]["model"].clone()
    vac(gram(float64([0, 0], [1, 1], [0, 2])), None)
    after = vac.memory["rho"]["model"]
    assert_close(after[0], before[0], rtol=0, atol=0)
    assert_close(after[:, 0], before[:, 0], rtol=0, atol=0)
    assert after[1, 2] != before[1, 2]
    M = gram(float64([1, 2, 3], [-1, -2, -3], [0.3, 0, 1]))
    C, rho = vaccinate(M, visits(3), torch.zeros(3, 3, dtype=D))
    assert rho[0, 2] == 0 and C[0, 2] == 0  # task 1 has vanished before it meets task 3


def test_gradvac_first_step_is_pcgrad(float64, gram):
    G = float64([1, 0], [-1, 1])
    assert_close(GradVac(eps=0)(gram(G), None), float64(2.0, 1.5))
    by_tensor = GradVac(eps=0, group="tensor")(gram(G)[None], None, [0])
    assert_close(by_tensor, float64([2.0], [1.5]))


def test_gradvac_opposite_gradients_cancel_and_are_passed_over_whatever_the_rounding(draw, gram):
    for seed in range(100):
        g, third = draw(2, 7, seed=seed)
        G = torch.stack([g, -3 * g, third])
        C, rho = vaccinate(gram(G), visits(3), torch.zeros(3, 3, dtype=D))
        assert_close(C[0] @ G, torch.zeros(7, dtype=D), rtol=0, atol=1e-12)
        assert rho[0, 2] == 0 and C[0, 2] == 0


def test_gradvac_equal_gradients_for_long(float64, gram):
    vac = GradVac(eps=0)
    for _ in range(200):
        weights = vac(torch.ones(3, 3, dtype=D), None)
    assert_close(weights, torch.ones(3, dtype=D))
    assert vac(gram(float64([1, 0], [1, 1], [0, 1])), None).isfinite().all()


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_gradvac_duplicate_losses_stay_the_sum_in_training(dtype, eps):
    torch.manual_seed(0)
    x = torch.randn(64, 5, dtype=dtype)
    y = torch.randn(64, 1, dtype=dtype)
    layers = torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    net = torch.nn.Sequential(*layers).to(dtype)
    balancer = make_balancer("GradVac", shared=net, num_tasks=2, seed=0, eps=eps)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        balancer.backward([loss, 3 * loss])
        assert_close(balancer.weights.double(), torch.ones(2, dtype=D), rtol=0, atol=0)
        optimizer.step()


@pytest.mark.parametrize("length", [100, 100_000])
def test_gradvac_float32_multiples_stay_the_sum(length, draw):
    vac = GradVac(eps=0, seed=0)
    for seed in range(60):
        g = draw(length, seed=seed).float()
        weights = vac(gramian([[g], [3.7 * g]]), torch.ones(2))
        assert_close(weights, torch.ones(2, dtype=D), rtol=0, atol=0)


@pytest.mark.parametrize("small", [1e-1, 1e-2, 1e-4, 1e-8])
def test_gradvac_equal_gradients_that_get_short_stay_the_sum(small):
    vac = GradVac()
    for _ in range(40):
        vac(torch.ones(2, 2, dtype=D), None)
    for _ in range(3):
        weights = vac(small**2 * torch.ones(2, 2, dtype=D), None)
        assert_close(weights, torch.ones(2, dtype=D), rtol=0, atol=0)


def test_gradvac_amount_rises_to_a_bound_and_stays_there(float64, gram):
    less = float64([1, 0.9], [0.9, 1])
    amounts = []
    for k in (1, 5, 10, 20, 40, 53, 54, 60, 300):
        vac = GradVac(eps=0)
        for _ in range(k):
            vac(torch.ones(2, 2, dtype=D), None)
        amounts.append(vac(less, None)[0].item())
    assert amounts[0] < amounts[1] < amounts[2] < amounts[3]
    assert amounts[3:] == pytest.approx([amounts[-1]] * 6, rel=1e-12)
    target = 1 - 1e-5  # 1 + sin(angle - usual angle) / sin(usual angle)
    sine_of_target = (1 - target**2) ** 0.5
    bound = (target * (1 - 0.81) ** 0.5 - 0.9 * sine_of_target) / sine_of_target
    assert amounts[-1] == pytest.approx(1 + bound, rel=1e-9)
    worst = vaccinate(gram(float64([1, 0], [0, 1e-3])), visits(2), torch.ones(2, 2, dtype=D))[0]
    assert 223e3 < worst[0, 1] < 224e3  # right angle, times the ratio of lengths


def test_gradvac_correction_sets_in_without_a_jump(float64):
    rho = torch.full((2, 2), 1.0, dtype=D)
    for off, largest in ((1e-5, 1e-9), (1e-5 + 6e-8, 4e-3), (1.1e-5, 0.06)):
        C, _ = vaccinate(float64([1, 1 - off], [1 - off, 1]), visits(2), rho)
        assert 0 <= C[0, 1] < largest


def test_gradvac_lengths_at_the_ends_of_the_range_are_finite(float64):
    for M in (
        float64([1e300, 0], [0, 1e-299]),
        float64([1e306, 0], [0, 1e-320]),
        float64([1e-310, 0], [0, 1e-310]),
    ):
        C, rho = vaccinate(M, visits(2), torch.full((2, 2), 1.0, dtype=D))
        assert C.isfinite().all() and rho.isfinite().all()


@pytest.mark.parametrize(
    "options, argument",
    [
        ({"beta": 1.5}, "beta"),
        ({"beta": None}, "beta"),
        ({"group": "layer"}, "group"),
        ({"group": []}, "group"),
        ({"group": ""}, "group"),
        ({"group": None}, "group"),
        ({"group": [["a"], ["b"]]}, "group"),
        ({"update": "x"}, "update"),
        ({"eps": float("nan")}, "eps"),
        ({"eps": float("inf")}, "eps"),
        ({"order": "x"}, "order"),
    ],
)
def test_options_out_of_range_are_named(options, argument):
    with pytest.raises(ValueError, match=argument):
        GradVac(**options)
