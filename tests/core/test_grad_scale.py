"""The route of float16: a GradScaler's factor in the cotangents, out of the norms, and in `.grad`
again."""

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.testing import assert_close

from dbmtl import DBMTL, make_balancer
from dbmtl.core.grad_scale import GradScale

METHODS = ["EW", "loss-only", "gradient-only", "DB-MTL", "IMTL-L"]


def net(dtype=torch.float32):
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
    return nn.ModuleDict(
        {"trunk": trunk, "heads": nn.ModuleList(nn.Linear(6, 1) for _ in range(3))}
    ).to(dtype)


def losses_of(model, seed, spoil=None):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)).to(
        model["trunk"][0].weight
    )
    z, losses = model["trunk"](x), []
    for t, head in enumerate(model["heads"]):
        entry = z * 1.0
        if t == spoil:
            entry.register_hook(lambda g: g * torch.inf)
        losses.append(10.0**t * (head(entry).float() - t).square().mean() + 0.1)
    return losses


def train(method, scaler, dtype=torch.float32, spoilt=(), accumulate=False, steps=6):
    """Parameters after some steps, and the balancer."""
    model = net(dtype)
    balancer = make_balancer(method, shared=model["trunk"], num_tasks=3)
    sgd = torch.optim.SGD([*model.parameters(), *balancer.parameters()], 1e-3)
    how = {} if scaler is None else {"scaler": scaler}
    for seed in range(steps):
        losses = losses_of(model, seed, spoil=1 if seed in spoilt else None)
        if accumulate:
            balancer.accumulate(losses, 4, **how)
            balancer.accumulate(losses_of(model, seed), 4, **how)
            balancer.backward(**how)
        else:
            balancer.backward(losses, **how)
        if scaler is None:
            sgd.step()
        else:
            scaler.step(sgd)
            scaler.update()
        sgd.zero_grad()
    return [p.detach().float() for p in (*model.parameters(), *balancer.parameters())], balancer


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_scaler_changes_nothing_in_float32(method, accumulate):
    ours, balancer = train(method, GradScaler("cpu", 2.0**16), accumulate=accumulate)
    plain, without = train(method, None, accumulate=accumulate)
    assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert_close(balancer.slopes, without.slopes, rtol=1e-5, atol=0)
    assert_close(balancer.weights, without.weights, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_hold_the_factor_as_after_scaler_scale(method):
    scaled = net()
    plain = net()
    make_balancer(method, shared=scaled["trunk"], num_tasks=3).backward(
        losses_of(scaled, 0), scaler=GradScaler("cpu", 1024.0)
    )
    make_balancer(method, shared=plain["trunk"], num_tasks=3).backward(losses_of(plain, 0))
    assert_close(
        [p.grad / 1024 for p in scaled.parameters()],
        [p.grad for p in plain.parameters()],
        rtol=1e-5,
        atol=1e-7,
    )


def test_learned_scales_hold_the_factor_too():
    model = net()
    balancer = make_balancer("IMTL-L", shared=model["trunk"], num_tasks=3)
    losses = losses_of(model, 0)
    balancer.backward(losses, scaler=GradScaler("cpu", 512.0))
    assert_close(next(balancer.parameters()).grad, 512 * (torch.stack(losses).detach() - 1))


def test_a_disabled_scaler_changes_nothing():
    assert_close(
        train("DB-MTL", GradScaler("cpu", enabled=False))[0],
        train("DB-MTL", None)[0],
        rtol=1e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize("accumulate", [False, True])
def test_an_overflow_is_skipped_and_the_average_stays(accumulate):
    scaler = GradScaler("cpu", 2.0**10)
    ours, balancer = train("DB-MTL", scaler, spoilt=(2,), accumulate=accumulate)
    assert scaler.get_scale() == 2.0**9
    assert balancer.nonfinite.tolist() == [0, 1, 0]
    assert all(p.isfinite().all() for p in ours)
    assert all(g.isfinite().all() for row in balancer.ema.rows.values() for g in row.values())


def test_a_real_overflow_of_float16_is_skipped():
    """float16 parameters and a factor of 2^24: the cotangents overflow in the half-precision
    layers."""
    model = net(torch.float16)
    scaler = GradScaler("cpu", 2.0**24, backoff_factor=2.0**-20)
    balancer = DBMTL(shared=model["trunk"], num_tasks=3)
    master = torch.optim.SGD(model.parameters(), 1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    balancer.backward(losses_of(model, 0), scaler=scaler)
    assert any(not p.grad.isfinite().all() for p in model["trunk"].parameters())
    assert balancer.nonfinite.sum() > 0 and not balancer.ema.rows.keys() >= {0, 1, 2}
    for p in (
        model.parameters()
    ):  # step and unscale_ refuse float16 gradients, as they do in plain PyTorch
        p.grad = p.grad.float().to(p.dtype)
    with pytest.raises(ValueError, match="FP16"):
        scaler.step(master)
    assert_close(list(model.parameters()), before)


@pytest.mark.parametrize("scale", [None, 64.0])
@pytest.mark.parametrize("method", METHODS)
def test_float16_parameters_follow_float32(method, scale):
    half = net(torch.float16)
    plain = net()
    scaler = None if scale is None else GradScaler("cpu", scale)
    make_balancer(method, shared=half["trunk"], num_tasks=3).backward(
        losses_of(half, 0), scaler=scaler
    )
    make_balancer(method, shared=plain["trunk"], num_tasks=3).backward(losses_of(plain, 0))
    for p, q in zip(half.parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == torch.float16
        assert ((p.grad.float() / (scale or 1) - q.grad).norm() / q.grad.norm()).item() < 0.02


def test_norms_and_averages_of_half_gradients_are_float32_behind_a_scaler():
    model = net(torch.float16)
    balancer = DBMTL(shared=model["trunk"], num_tasks=3)
    balancer.backward(losses_of(model, 0), scaler=GradScaler("cpu", 64.0))
    assert {g.dtype for row in balancer.ema.rows.values() for g in row.values()} == {torch.float32}
    assert balancer.weights.dtype == torch.float32


@pytest.mark.parametrize("method", ["EW", "DB-MTL"])
def test_autocast_to_bfloat16(method):
    model = net()
    plain = net()
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(model, 0)
    make_balancer(method, shared=model["trunk"], num_tasks=3).backward(losses)
    make_balancer(method, shared=plain["trunk"], num_tasks=3).backward(losses_of(plain, 0))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert ((p.grad - q.grad).norm() / q.grad.norm()).item() < 0.05


@pytest.mark.filterwarnings("ignore:.*reached by two or more losses")
def test_a_hook_runs_once_when_both_tasks_have_added_to_a_gradient():
    """An optimizer that steps in such a hook would otherwise take a step for each task."""
    theta = nn.Parameter(torch.ones(2))
    outside = nn.Parameter(torch.ones(2))
    seen = []
    outside.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    balancer = make_balancer("gradient-only", shared=[theta], num_tasks=2)
    product = theta * outside
    balancer.backward([product.sum(), 3 * product.sum()])
    assert_close(seen, [torch.full((2,), 4.0)])


def test_a_small_gradient_of_float16_is_unscaled_in_float32():
    """2^-10 / 2^16 is below the smallest number of float16."""
    scale = GradScale(GradScaler("cpu", 2.0**16), "cpu")
    [gradient] = scale.unscale([torch.tensor([2.0**-10], dtype=torch.float16)])
    assert_close(gradient, torch.tensor([2.0**-26]), rtol=0, atol=0)
