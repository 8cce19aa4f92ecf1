"""ConFIG: numbers by hand, the pseudoinverse of unit gradients, lower ranks."""

import pytest
import torch
from torch.testing import assert_close

from dbmtl.gradient_balancing.config import ConFIG, conflict_free_weights

D = torch.float64


@pytest.mark.parametrize("T", [1, 2, 5, 12])
def test_config_is_the_pseudoinverse_of_unit_rows(T, draw, gram):
    G = draw(T, 20, seed=20 + T) * torch.logspace(-3, 3, T, dtype=D)[:, None]
    x = torch.linalg.pinv(G / G.norm(dim=1, keepdim=True)).sum(1)
    x = x / x.norm()
    direction = ConFIG()(gram(G), torch.ones(T, dtype=D)) @ G
    assert_close(direction, (G @ x).sum() * x, rtol=1e-8, atol=1e-8 * direction.norm().item())


def test_config_by_hand_and_rank_deficient(float64, gram):
    by_hand = conflict_free_weights(gram(float64([3, 0], [0, 4])))
    assert_close(by_hand, float64(7 / 6, 7 / 8))
    assert_close(conflict_free_weights(gram(float64([1, 2], [-1, -2]))), torch.zeros(2, dtype=D))
    more_tasks_than_dimensions = float64([1, 2], [-3, 1], [5, 1], [0, -1])
    one_zero = float64([1, 2], [0, 0], [-1, 1])
    opposite_and_unequal = float64([1, 2], [-3, -6], [5, 1])
    for G in (more_tasks_than_dimensions, one_zero, opposite_and_unequal):
        unit = torch.nan_to_num(G / G.norm(dim=1, keepdim=True))
        x = torch.linalg.pinv(unit).sum(1)
        x = x / x.norm()
        assert_close(conflict_free_weights(gram(G)) @ G, (G @ x).sum() * x)
