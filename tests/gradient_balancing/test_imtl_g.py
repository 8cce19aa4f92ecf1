"""IMTL-G: numbers by hand, the paper's formula, limits where its inverse fails."""

import pytest
import torch
from torch.testing import assert_close

from dbmtl.gradient_balancing.imtl_g import IMTLG, impartial_weights

D = torch.float64


@pytest.mark.parametrize("T", [2, 3, 6, 12])
def test_imtlg_projects_equally_and_sums_to_one(T, draw, gram):
    G = draw(T, 20, seed=T, mean=0.2) * torch.logspace(-4, 4, T, dtype=D)[:, None]
    weights = IMTLG()(gram(G), torch.ones(T, dtype=D))
    on_units = (G / G.norm(dim=1, keepdim=True)) @ (weights @ G)
    assert_close(on_units, on_units[:1].expand(T), rtol=1e-7, atol=0)
    assert_close(weights.sum().item(), 1.0)
    unit = G / G.norm(dim=1, keepdim=True)
    difference = G[0] - G[1:]
    of_units = unit[0] - unit[1:]
    of_paper = torch.linalg.solve((difference @ of_units.T).T, of_units @ G[0])
    assert_close(weights[1:], of_paper, rtol=1e-5, atol=1e-6)


def test_imtlg_by_hand_and_where_the_inverse_fails(float64, gram):
    half = impartial_weights(gram(float64([3, 0], [0, 4])))
    assert_close(half, float64(4 / 7, 3 / 7))
    for second in ([2, 4], [-2, -4]):
        parallel = impartial_weights(gram(float64([1, 2], second)))
        assert_close(parallel, float64(2 / 3, 1 / 3))
    three = impartial_weights(gram(float64([3, 0], [0, 4], [0, 0])))
    assert_close(three, float64(4 / 7, 3 / 7, 0))
    assert_close(impartial_weights(gram(float64([0, 0], [0, 0]))), torch.zeros(2, dtype=D))
    # three at 120 degrees: no common angle
    plane = float64([1, 0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)])
    assert_close(impartial_weights(gram(plane)), torch.full((3,), 1 / 3, dtype=D))


def test_imtlg_is_the_limit_of_nearly_equal_and_nearly_opposite_gradients(float64, gram):
    for base in (0.0, torch.pi):
        angle = torch.tensor(base + 1e-5, dtype=D)
        near = torch.stack([float64(1.0, 0.0), 3 * torch.stack([angle.cos(), angle.sin()])])
        exact = float64([1.0, 0.0], [3.0 if base == 0 else -3.0, 0.0])
        expected = impartial_weights(gram(exact))
        assert_close(impartial_weights(gram(near)), expected, rtol=1e-4, atol=1e-4)


def test_imtlg_sum_of_zero_gives_zero_weights(float64, gram):
    units = float64([0.6, 0, 0.8], [-0.6, 0, 0.8], [0, 0.6, 0.8])
    units[2] = float64(0, 0.3, 1.0) / 1.09**0.5
    beta = torch.linalg.solve(gram(units), torch.ones(3, dtype=D))
    assert beta[2] < 0
    units[2] *= -beta[2] / (beta[0] + beta[1])
    weights = impartial_weights(gram(units))
    # exactly on the pole, or rounding beside it
    assert weights.abs().max() == 0 or weights.abs().max() > 1e9
    assert weights.isfinite().all()
