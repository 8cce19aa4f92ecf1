"""PCGrad: numbers by hand, projections of vectors, orders, state."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from dbmtl.gradient_balancing.pcgrad import PCGrad, project_conflicts, visits

D = torch.float64


def pcgrad_in_vectors(G, order, itself):
    projected = []
    for i, path in enumerate(order.tolist()):
        g = G[i]
        for j in path:
            if (itself or i != j) and g @ G[j] < 0:
                g = g - (g @ G[j]) / (G[j] @ G[j]) * G[j]
        projected.append(g)
    return torch.stack(projected)


@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("T", [2, 3, 6, 12])
def test_pcgrad_from_the_gramian_is_pcgrad_on_vectors(T, itself, draw, gram):
    for seed in range(5):
        G = draw(T, T, seed=seed, mean=-0.2)
        order = visits(T, torch.Generator().manual_seed(seed))
        from_gramian = project_conflicts(gram(G), order, itself) @ G
        assert_close(from_gramian, pcgrad_in_vectors(G, order, itself))


def test_pcgrad_by_hand(float64, gram):
    G = float64([1, 0], [-1, 1])
    for itself in (True, False):
        assert_close(PCGrad(itself, eps=0)(gram(G), None), float64(2.0, 1.5))
    # eps enters as in LibMTL: 1 - M12 / (M_tt + eps)
    assert_close(PCGrad(eps=1.0)(gram(G), None), float64(1 + 1 / 2, 1 + 1 / 3))


def test_pcgrad_passes_over_a_gradient_whose_square_underflows(float64):
    M = float64([1, -1e-200], [-1e-200, 0])
    assert_close(PCGrad(eps=0)(M, None), torch.ones(2, dtype=D))


def test_pcgrad_own_visit_matters_from_three_tasks_on(float64, gram):
    G = float64([1, -3], [0, 1], [-1, 1])
    order = torch.tensor([[1, 2, 0], [0, 1, 2], [0, 1, 2]])
    assert_close(project_conflicts(gram(G), order, False)[0] @ G, float64(0.5, 0.5))
    assert_close(project_conflicts(gram(G), order, True)[0] @ G, float64(0.6, 0.2))


def test_pcgrad_mean_over_all_orders_is_equivariant(draw, gram):
    G = draw(3, 4, seed=2, mean=-0.3)
    orders = list(itertools.permutations(range(3)))

    # each task's order is its own, so the mean over all of them can be taken task by task
    def mean(G):
        tables = [torch.tensor([path] * 3) for path in orders]
        return sum(project_conflicts(gram(G), table) for table in tables).sum(0) / len(orders)

    assert_close(mean(G[[2, 0, 1]]), mean(G)[[2, 0, 1]])


def test_pcgrad_one_rescaled_loss_rescales_its_own_row_alone(draw, gram, float64):
    G = draw(5, 5, seed=1, mean=-0.2)
    scale = float64(1, 1e4, 1e-4, 3, 1)[:, None]
    before = project_conflicts(gram(G), visits(5)) @ G
    after = project_conflicts(gram(scale * G), visits(5)) @ (scale * G)
    assert_close(after, scale * before)


def test_random_orders_are_uniform_seeded_and_saved(draw, gram):
    generator = torch.Generator().manual_seed(0)
    first = torch.cat([visits(3, generator) for _ in range(400)])[:, 0]
    assert (torch.bincount(first) - 400).abs().max() < 100  # six standard errors
    G = draw(6, 6, seed=4, mean=-0.4)
    a = PCGrad(seed=5)
    b = PCGrad(seed=5)
    other = PCGrad(seed=6)
    assert_close(a(gram(G), None), b(gram(G), None), rtol=0, atol=0)
    assert not torch.equal(other(gram(G), None), PCGrad(seed=5)(gram(G), None))
    fresh = PCGrad()
    fresh.load_state_dict(a.state_dict())
    ahead = [a(gram(G), None) for _ in range(3)]
    assert_close([fresh(gram(G), None) for _ in range(3)], ahead, rtol=0, atol=0)
    assert not torch.equal(ahead[0], ahead[1])


@pytest.mark.parametrize(
    "options, argument",
    [
        ({"eps": -1.0}, "eps"),
        ({"eps": float("inf")}, "eps"),
        ({"eps": None}, "eps"),
        ({"order": "x"}, "order"),
        ({"order": ["fixed"]}, "order"),
        ({"reduction": "x"}, "reduction"),
    ],
)
def test_options_out_of_range_are_named(options, argument):
    with pytest.raises(ValueError, match=argument):
        PCGrad(**options)
