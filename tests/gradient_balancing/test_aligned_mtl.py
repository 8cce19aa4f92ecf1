"""Aligned-MTL: numbers by hand, singular values, rank and tolerance."""

import pytest
import torch
from torch.testing import assert_close

from dbmtl.gradient_balancing.aligned_mtl import AlignedMTL, aligned_weights

D = torch.float64


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_aligned_gradients_are_orthogonal_and_of_one_length(scale, draw, gram):
    G = draw(6, 15, seed=40) * torch.logspace(-1, 2, 6, dtype=D)[:, None]
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    lower_median = S[3]  # of six, in falling order
    common = {"min": S[-1], "median": lower_median, "rmse": S.square().mean().sqrt()}
    aligned = common[scale] * U @ Vh
    assert_close(torch.linalg.cond(aligned).item(), 1.0)
    assert_close(aligned_weights(gram(G), scale) @ G, aligned.sum(0), rtol=1e-6, atol=1e-8)
    losses = torch.ones(6, dtype=D)
    assert_close(6 * AlignedMTL(scale, "mean")(gram(G), losses), AlignedMTL(scale)(gram(G), losses))


def test_aligned_by_hand_rank_and_tolerance(float64, gram):
    assert_close(aligned_weights(gram(float64([3, 0], [0, 4]))), float64(1, 0.75))
    assert_close(aligned_weights(gram(float64([1, 2], [-3, -6]))), float64(-0.2, 0.6))
    assert_close(AlignedMTL()(torch.zeros(3, 3, dtype=D), None), torch.ones(3, dtype=D))
    mean_of_zeros = AlignedMTL(reduction="mean")(torch.zeros(2, 2, dtype=D), None)
    assert_close(mean_of_zeros, torch.full((2,), 0.5, dtype=D))
    M = gram(float64([1, 0], [0, 1e-4]))  # the second eigenvalue is 1e-8
    assert_close(AlignedMTL()(M, torch.ones(2)), float64(1.0, 0.0))
    assert_close(AlignedMTL()(M, torch.ones(2, dtype=D)), float64(1.0, 0.0))
    assert_close(AlignedMTL(rtol=2.2e-16)(M, torch.ones(2)), float64(1e-4, 1.0))


@pytest.mark.parametrize("T", [2, 3, 11])
def test_aligned_drops_a_gradient_below_the_root_of_the_tolerance(T):
    for factor, kept in ((0.99, False), (1.01, True)):
        M = torch.eye(T, dtype=D)
        M[-1, -1] = factor**2 * T * 1.2e-7
        assert (AlignedMTL()(M, torch.ones(T))[-1] > 0.5) == kept


@pytest.mark.parametrize(
    "options, argument",
    [
        ({"scale": "max"}, "scale"),
        ({"scale": ["min"]}, "scale"),
        ({"scale": None}, "scale"),
        ({"reduction": "max"}, "reduction"),
    ],
)
def test_options_out_of_range_are_named(options, argument):
    with pytest.raises(ValueError, match=argument):
        AlignedMTL(**options)


def test_heads_are_weighted_if_asked():
    assert AlignedMTL(weights_heads=True).weights_heads
