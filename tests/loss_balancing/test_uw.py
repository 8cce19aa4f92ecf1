"""UW: hand-computed numbers, its relation to IMTL-L, and where its scales come to rest."""

import math

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.transform import slopes
from dbmtl.loss_balancing.imtl_l import IMTLL
from dbmtl.loss_balancing.uw import UW


def test_uw_by_hand():
    method = UW(2)
    slope, [scale_gradient] = slopes(method, torch.tensor([1.0, 4.0]))
    assert_close(slope, torch.full((2,), 0.5 * math.exp(0.5)))
    assert_close(scale_gradient, 0.5 - 0.5 * math.exp(0.5) * torch.tensor([1.0, 4.0]))


def test_uw_is_half_of_imtl_l_with_the_sign_of_s_turned(draw):
    uw = UW(4)
    imtl = IMTLL(4)
    losses = draw(4)[0]
    with torch.no_grad():
        uw.s.normal_()
        imtl.s.copy_(-uw.s)
    assert_close(uw(losses), imtl(losses) / 2)
    assert_close(slopes(uw, losses)[0], slopes(imtl, losses)[0] / 2)
    assert_close(slopes(uw, losses)[1][0], -slopes(imtl, losses)[1][0] / 2)


def test_uw_learned_scale_finds_the_loss(step):
    method = UW(3)
    losses = torch.tensor([0.2, 1.0, 7.0])
    for _ in range(600):
        step(method, losses)
    assert_close(method.s.exp().detach(), losses, rtol=1e-3, atol=0)
    assert_close(slopes(method, losses)[0], 1 / (2 * losses), rtol=1e-3, atol=0)


def test_uw_half_for_each_task():
    slope = slopes(UW(3, init=0.0, half=(True, False, True)), torch.ones(3))[0]
    assert_close(slope, torch.tensor([0.5, 1.0, 0.5]))
    with pytest.raises(ValueError, match="half must be a bool or 3"):
        UW(3, half=(True, False))
    assert UW(2).valid(torch.tensor([0.0, -1e-9])).tolist() == [True, False]


def test_uw_init_is_checked():
    with pytest.raises(ValueError, match="init must be a finite number, got nan"):
        UW(2, init=math.nan)
