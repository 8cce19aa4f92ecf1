"""The spectrum of a Gramian: numbers by hand, the tolerance, the rounding of float32."""

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.gramian import gramian, spectrum


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
