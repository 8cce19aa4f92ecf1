"""What the tests of several loss methods share."""

import pytest
import torch

from dbmtl.core.transform import slopes


@pytest.fixture
def draw():
    """Losses of some steps, [steps, T], between 0.05 and 1.05."""

    def draw_losses(num_tasks, steps=8, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(steps, num_tasks, generator=generator, dtype=dtype) + 0.05

    return draw_losses


@pytest.fixture
def step():
    """One step as a balancer does it: slopes, SGD on learned scales, hooks; returns the slopes."""

    def take_step(method, losses, after=None):
        slope, scale_gradients = slopes(method, losses)
        with torch.no_grad():
            for scale, gradient in zip(method.parameters(), scale_gradients, strict=True):
                scale -= 0.1 * gradient
        method.advance(losses)
        if method.looks_again:
            method.after_step(losses.pow(1.5) if after is None else after)
        return slope

    return take_step


@pytest.fixture
def run(step):
    """Some steps; returns their slopes, [steps, T]."""

    def take_steps(method, batches):
        return torch.stack([step(method, losses) for losses in batches])

    return take_steps


@pytest.fixture
def central_differences():
    """The derivatives of a function of T losses, [T], from its values beside them."""

    def differences(value, losses, widths):
        with torch.no_grad():
            rows = torch.diag(widths)
            above = torch.stack([value(losses + row) for row in rows])
            below = torch.stack([value(losses - row) for row in rows])
        return (above - below) / (2 * widths)

    return differences
