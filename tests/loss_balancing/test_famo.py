"""FAMO: against PyTorch's Adam and autograd, its second look, units and bounds."""

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.transform import slopes
from dbmtl.loss_balancing.famo import FAMO

F64 = torch.float64


def test_famo_agrees_with_torch_adam_and_autograd(draw):
    method = FAMO(4, w_lr=0.05, gamma=0.01)
    w = torch.zeros(4, dtype=F64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=0.05, weight_decay=0.01)
    for k in range(40):
        old, new = draw(4, 2, seed=k)
        z = w.detach().softmax(0)
        D = old + 1e-8
        assert_close(slopes(method, old)[0], z / D / (z / D).sum())
        method.advance(old)
        method.after_step(new)
        (w.grad,) = torch.autograd.grad(w.softmax(0), w, (D.log() - (new + 1e-8).log()))
        adam.step()
        assert_close(method.memory["w"], w.detach(), rtol=1e-10, atol=1e-13)
    assert w.abs().max() > 0.05


def test_famo_slopes_sum_to_one_and_improved_tasks_lose_weight(step):
    method = FAMO(3)
    losses = torch.tensor([1.0, 2.0, 5.0], dtype=F64)
    for _ in range(10):
        slope = step(method, losses, after=losses * torch.tensor([0.5, 0.9, 1.0], dtype=F64))
        assert_close(slope.sum(), torch.tensor(1.0, dtype=F64))
    w = method.memory["w"]
    assert w[0] < w[1] < w[2]


def test_famo_scaling_a_loss_changes_only_the_common_factor(draw, step):
    unit = torch.tensor([1.0, 1e3, 1e-3], dtype=F64)
    plain = FAMO(3)
    scaled = FAMO(3)
    for losses in draw(3):
        after = losses.pow(1.5)
        a = step(plain, losses, after) * losses
        b = step(scaled, losses * unit, after * unit) * losses * unit
        assert_close(a / a.sum(), b / b.sum(), rtol=1e-4, atol=0)


def test_famo_missing_second_look_is_an_error():
    method = FAMO(2)
    losses = torch.ones(2)
    slopes(method, losses)
    slopes(method, losses)  # a refused step leaves nothing pending
    method.advance(losses)
    with pytest.raises(RuntimeError, match=r"balancer\.after_step\(losses\)"):
        slopes(method, losses)
    other = FAMO(2)
    other.load_state_dict(method.state_dict())
    with pytest.raises(RuntimeError, match=r"balancer\.after_step\(losses\)"):
        slopes(other, losses)
    other.after_step(0.9 * losses)
    slopes(other, losses)
    with pytest.raises(RuntimeError, match="after a backward"):
        other.after_step(losses)


def test_famo_second_look_that_is_not_finite_counts_as_unchanged():
    bad = FAMO(2)
    same = FAMO(2)
    for method, after in ((bad, [float("nan"), 0.5]), (same, [2.0, 0.5])):
        method.advance(torch.tensor([2.0, 1.0]))
        method.after_step(torch.tensor(after))
    assert_close(bad.memory["w"], same.memory["w"], rtol=0, atol=0)
    assert bad.memory["w"][0] > 0 > bad.memory["w"][1]


def test_famo_lower_bounds():
    method = FAMO(2, b=[0.0, 3.0])
    assert method.valid(torch.tensor([0.0, 2.9])).tolist() == [True, False]
    slope = slopes(method, torch.tensor([1.0, 5.0], dtype=F64))[0]
    assert_close(slope, torch.tensor([2 / 3, 1 / 3], dtype=F64), rtol=1e-7, atol=0)
    assert "b = (0.0, 3.0)" in method.domain
    with pytest.raises(ValueError, match="b must be a finite number or 2"):
        FAMO(2, b=(1.0, 2.0, 3.0))


def test_famo_notices_losses_that_were_not_computed_anew():
    method = FAMO(2)
    slopes(method, torch.tensor([1.0, 2.0]))
    method.advance(torch.tensor([1.0, 2.0]))
    assert method.doubt() == ""
    method.after_step(torch.tensor([1.0, 2.0]))
    assert method.doubt() == "after_step got the very losses of before"
    assert method.doubt() == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_lr": -1.0}, "w_lr must be a finite number at least 0, got -1.0"),
        ({"gamma": float("inf")}, "gamma must be a finite number at least 0, got inf"),
        ({"eps": float("nan")}, "eps must be a finite number at least 0, got nan"),
    ],
)
def test_famo_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        FAMO(2, **options)
