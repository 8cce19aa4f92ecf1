"""Adam as a function: against torch.optim.Adam, in place, and the two ways to round."""

import copy

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.adam import adam_moments, adam_step, bias_corrected, new_moments, update_moments

SHAPES = [(3,), (2, 4), ()]


def gradients_of(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def zeros(dtype=torch.float64):
    return [torch.zeros(shape, dtype=dtype) for shape in SHAPES]


@pytest.mark.parametrize("lr", [0.0, 1e-3, 0.1])
def test_adam_step_agrees_with_torch(lr):
    ours = gradients_of(1000)
    theirs = [p.clone().requires_grad_() for p in ours]
    state = new_moments(ours)
    optimizer = torch.optim.Adam(theirs, lr=lr)
    for step in range(30):
        for p, gradient in zip(theirs, gradients_of(step), strict=True):
            p.grad = gradient
        adam_step(ours, gradients_of(step), state, lr)
        optimizer.step()
    assert_close(ours, [p.detach() for p in theirs], rtol=1e-11, atol=1e-13)
    assert state["step"] == 30


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.3, 0.3)])
@pytest.mark.parametrize("interpolate", [False, True])
def test_adam_moments_are_the_steps_of_torch(betas, interpolate):
    theirs = [p.requires_grad_() for p in zeros()]
    optimizer = torch.optim.Adam(theirs, lr=1.0, betas=betas, eps=0.0)
    first = zeros()
    second = zeros()
    for step in range(1, 20):
        gradients = gradients_of(step)
        before = [p.detach().clone() for p in theirs]
        for p, gradient in zip(theirs, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        steps = [step] * len(gradients)
        means, roots = adam_moments(gradients, first, second, steps, betas, interpolate=interpolate)
        moved = [old - p.detach() for old, p in zip(before, theirs, strict=True)]
        assert_close([m / r for m, r in zip(means, roots, strict=True)], moved)


def test_adam_moments_change_in_place_and_gradients_do_not():
    first = zeros()
    second = zeros()
    gradients = gradients_of(0)
    copies = copy.deepcopy(gradients)
    means, roots = adam_moments(gradients, first, second, [1, 1, 1])
    assert_close(gradients, copies, rtol=0, atol=0)
    assert_close(first, [0.1 * g for g in gradients])
    assert_close(second, [0.001 * g**2 for g in gradients])
    assert_close(means, gradients)
    assert_close(roots, [g.abs() for g in gradients])
    assert all(mean is not m for mean, m in zip(means, first, strict=True))


def test_bias_correction_has_a_count_for_each_tensor():
    ones = [torch.ones(2, dtype=torch.float64)] * 3
    corrected = bias_corrected(ones, [1, 2, 100], 0.5)
    assert_close(torch.stack(corrected)[:, 0], torch.tensor([2.0, 4 / 3, 1.0]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_round_as_written(dtype):
    """Runs are compared bit for bit, so the order of operations is fixed."""
    first, second, interpolated = (zeros(dtype) for _ in range(3))
    m, v, u = (torch.zeros(3, dtype=dtype) for _ in range(3))
    for step in range(20):
        gradients = gradients_of(step, dtype)
        update_moments(gradients, first, second, weights=(0.1, 0.001))
        update_moments(
            gradients, zeros(dtype), interpolated, weights=(0.1, 0.001), interpolate=True
        )
        g = gradients[0]
        m = m.lerp(g, 0.1)
        v = (v * 0.999).addcmul(g, g, value=0.001)
        u = u.lerp(g * g, 0.001)
        assert torch.equal(first[0], m)
        assert torch.equal(second[0], v)
        assert torch.equal(interpolated[0], u)
