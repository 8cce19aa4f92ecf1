"""Lengths, inner products and the spectrum: numbers by hand, and the range of float32."""

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.gramian import combine, cosines, gramian, norms, spectrum, tensor_norms


def test_spectrum_by_hand():
    values, vectors, significant = spectrum(torch.tensor([[1.0, 2.0], [2.0, 4.0]]).double(), 1e-12)
    assert_close(values, torch.tensor([0.0, 5.0], dtype=torch.float64))
    assert_close(vectors[:, 1].abs(), torch.tensor([1.0, 2.0], dtype=torch.float64) / 5**0.5)
    assert significant.tolist() == [False, True]


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("T", [2, 3, 11])
def test_an_eigenvalue_counts_above_the_tolerance_relative_to_the_largest(T, scale):
    for factor, counts in ((0.99, False), (1.01, True)):
        M = torch.eye(T, dtype=torch.float64)
        M[0, 0] = factor * T * 1.2e-7
        assert spectrum(scale * M, 1.2e-7)[2].tolist() == [counts] + [True] * (T - 1)


def test_nothing_counts_where_there_is_no_gradient():
    assert not spectrum(torch.zeros(3, 3, dtype=torch.float64), 1.2e-7)[2].any()


def test_the_rank_of_float32_gradients_is_found():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 1000, generator=generator)
        significant = spectrum(gramian([[a], [1.7 * a], [b]]), 1.2e-7)[2]
        assert significant.tolist() == [False, True, True]


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1e-15, 1.0, 1e18, 1e20, 1e30, 3e37])
def test_lengths_of_any_finite_size(size):
    """float32 squares overflow above 1.8e19 and vanish below 1e-19."""
    generator = torch.Generator().manual_seed(0)
    rows = [[torch.randn(n, generator=generator) * size for n in (3, 50)] for _ in range(3)]
    wide = [[g.double() for g in row] for row in rows]
    assert_close(norms(rows), norms(wide).float(), rtol=1e-6, atol=0)
    assert_close(tensor_norms(rows), tensor_norms(wide).float(), rtol=1e-6, atol=0)
    assert_close(gramian(rows), gramian(wide), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e20, 1e30])
def test_inner_products_by_hand_beyond_float32(size):
    """All signs are the same: an overflow is infinite, and not the difference of two."""
    expected = torch.tensor([[1.0, 3.0], [3.0, 9.0]], dtype=torch.float64) * size**2
    rows = [[torch.tensor([size])], [torch.tensor([3 * size])]]
    assert_close(gramian(rows), expected, rtol=1e-6, atol=0)


def test_a_cosine_is_never_above_one():
    """3 times the square of 1 / sqrt(3) is not 1 in float64."""
    assert cosines(torch.full((2, 2), 3.0, dtype=torch.float64)).unique().tolist() == [1.0]


def test_lengths_of_rows_of_very_different_size():
    rows = [[torch.full((4,), size)] for size in (1e30, 1.0, 0.0, 1e-30, float("inf"))]
    expected = torch.tensor([2e30, 2.0, 0.0, 2e-30, float("inf")])
    assert_close(norms(rows), expected, rtol=1e-6, atol=0)
    assert_close(tensor_norms(rows), expected[:, None], rtol=1e-6, atol=0)
    assert norms([[torch.tensor([1.0, float("nan")])]]).isnan().all()


def test_safe_lengths_are_taken_in_float32_alone():
    """So that nobody pays for a second look, and no bit of a usual length changes."""
    rows = [[torch.randn(1000), torch.randn(10, 7)] for _ in range(3)]
    pieces = torch.stack([g.norm() for row in rows for g in row]).view(3, 2)
    assert_close(norms(rows), torch.linalg.vector_norm(pieces, dim=1), rtol=0, atol=0)


def test_tensors_of_every_size_are_summed_once():
    """Small ones are added together, some 131,072 numbers at a time."""
    sizes = (10, 140_000, 5, 6, 130_000, 1_061, 3)
    rows = [[torch.full((size,), factor) for size in sizes] for factor in (1.0, 10.0)]
    total = combine(rows, torch.tensor([2.0, 0.5]))
    assert_close(total, [torch.full((size,), 7.0) for size in sizes])
    factors = torch.arange(14.0).view(2, 7)
    total = combine(rows, factors)
    for piece, first, second in zip(total, *factors, strict=True):
        assert piece.unique().tolist() == [first + 10 * second]
