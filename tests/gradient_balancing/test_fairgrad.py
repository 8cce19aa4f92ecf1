"""FairGrad: the fairest share by Clarabel, its place between the sum and MGDA, its length."""

import cvxpy
import pytest
import torch
from torch.testing import assert_close

from dbmtl.gradient_balancing.fairgrad import FairGrad
from dbmtl.gradient_balancing.mgda import MGDA
from dbmtl.gradient_balancing.nash_mtl import NashMTL


@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
def test_fairgrad_is_the_fairest_share(alpha, draw, clarabel):
    G = draw(4, 6)
    a = FairGrad(alpha)(G @ G.T, None)
    assert_close(G @ (a @ G), a ** (-1 / alpha), rtol=1e-8, atol=0)
    x = cvxpy.Variable(6)
    utility = cvxpy.sum(cvxpy.power(G.numpy() @ x, 1 - alpha)) / (1 - alpha)
    clarabel(cvxpy.Problem(cvxpy.Maximize(utility), [cvxpy.norm(x) <= 1.0]))
    d = a @ G
    assert_close(d / d.norm(), torch.tensor(x.value), rtol=0, atol=1e-4)


def test_fairgrad_between_the_sum_and_mgda(float64, draw, direction):
    G = draw(3, 8, mean=0.3)
    assert_close(FairGrad(0.0)(G @ G.T, None), torch.ones(3, dtype=torch.float64))
    assert_close(FairGrad(1.0)(G @ G.T, None), NashMTL()(G @ G.T, None))
    far = direction(FairGrad(1000.0), G)
    least = direction(MGDA(), G)
    assert_close(far / far.norm(), least / least.norm(), rtol=0, atol=5e-3)
    assert_close(FairGrad()(torch.diag(float64(4.0, 1.0)), None), float64(4 ** (-2 / 3), 1.0))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_fairgrad_length_under_a_common_scale(alpha, draw, direction):
    G = draw(3, 8)
    expected = 100 ** ((1 - alpha) / (1 + alpha)) * direction(FairGrad(alpha), G)
    assert_close(direction(FairGrad(alpha), 100 * G), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("alpha", -1.0), ("alpha", float("inf")), ("max_norm", -1.0)],
)
def test_fairgrad_rejects(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        FairGrad(**{name: value})
