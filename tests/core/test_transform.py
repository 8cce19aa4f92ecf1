"""Memory, the base class of the loss axis, and slopes by finite differences."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from dbmtl import IMTLL, Log, Transform
from dbmtl.core.transform import Memory, all_or_nothing, check_layout, slopes


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


class Geometric(Transform):
    """A scalar-valued transform."""

    def forward(self, losses):
        return losses.log().mean().exp()


def test_slopes_are_derivatives_of_a_scalar_transform():
    losses = float64(0.2, 1.0, 30.0)
    h = 1e-6
    slope, _ = slopes(Geometric(), losses)
    above = torch.stack([Geometric()(losses + h * row) for row in torch.eye(3)])
    below = torch.stack([Geometric()(losses - h * row) for row in torch.eye(3)])
    assert_close(slope, (above - below) / (2 * h), rtol=1e-7, atol=1e-9)


@torch.no_grad()
def test_slopes_leave_nothing_behind():
    losses = float64(2.0)
    learned = IMTLL(1).double()
    slope, _ = slopes(learned, losses)
    assert not slope.requires_grad and not losses.requires_grad and learned.s.grad is None
    learned.s.requires_grad_(False)
    assert slopes(learned, losses)[1] == []


def test_learned_scales_are_found_in_parts_too():
    outer = Geometric()
    assert outer.learned_scales() == []
    outer.part = IMTLL(2)
    outer.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    [scale] = outer.learned_scales()
    assert scale is outer.part.s
    scale.requires_grad_(False)
    assert outer.learned_scales() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_follow_the_dtype_of_the_losses(dtype):
    assert slopes(Log(), torch.ones(2, dtype=dtype))[0].dtype == dtype


def test_transform_hooks_do_nothing():
    transform = Geometric()
    before = copy.deepcopy(transform.state_dict())
    transform.advance(torch.ones(2))
    transform.end_epoch(None)
    transform.after_step(torch.ones(2))
    transform.set_learning_rate_ratio(10.0)
    assert repr(transform.state_dict()) == repr(before)
    assert not transform.looks_again
    assert transform.valid(float64(-1.0, math.nan, math.inf)).tolist() == [True, False, False]


def test_transform_without_forward_is_named():
    class Empty(Transform):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty does not define forward\(losses\)"):
        slopes(Empty(), torch.ones(2))


def test_memory_is_saved_with_its_stream_and_moves():
    memory = Memory(seed=3)
    memory.memory = {"nested": [torch.ones(2), {"number": 4}], "pair": (torch.zeros(1), None)}
    torch.rand(5, generator=memory.generator())
    restored = Memory()
    restored.load_state_dict(memory.state_dict())
    expected = torch.rand(5, generator=memory.generator())
    assert_close(torch.rand(5, generator=restored.generator()), expected, rtol=0, atol=0)
    restored.double()
    assert restored.memory["nested"][0].dtype == torch.float64
    assert restored.memory["nested"][1] == {"number": 4} and restored.memory["pair"][1] is None
    memory.memory["nested"][0].zero_()
    assert_close(restored.memory["nested"][0], float64(1.0, 1.0))


def test_a_loaded_memory_does_not_change_the_state_that_it_came_from():
    """An agent such as IGBv2's writes into its memory, and a state may be loaded twice."""
    source = Memory(seed=3)
    source.memory = {"numbers": torch.ones(2), "nested": {"count": 4}}
    state = source.state_dict()
    restored = Memory()
    restored.load_state_dict(state)
    restored.memory["numbers"].add_(1)
    restored.memory["nested"]["count"] = 5
    again = Memory()
    again.load_state_dict(state)
    assert_close(again.memory["numbers"], torch.ones(2))
    assert again.memory["nested"] == {"count": 4}


def test_what_counts_in_whole_numbers_is_not_restored_from_floats():
    counts = torch.zeros(3, dtype=torch.long)
    check_layout("transform", counts + 1, counts.to("meta"), 3)
    with pytest.raises(ValueError, match=r"transform in the state must be a tensor \[3\]"):
        check_layout("transform", torch.ones(3), counts.to("meta"), 3)


def test_a_stream_that_began_in_a_failed_step_begins_anew():
    memory = Memory()
    with pytest.raises(RuntimeError, match="a step"), all_or_nothing(memory):
        torch.rand(3, generator=memory.generator())
        raise RuntimeError("a step that fails")
    assert memory.get_extra_state() == {"memory": {}, "streams": {}, "seed": None}


def test_a_step_that_is_interrupted_is_forgotten():
    """Ctrl-C is no Exception, and a notebook goes on after it."""
    memory = Memory()
    memory.memory = {"count": 1}
    with pytest.raises(KeyboardInterrupt), all_or_nothing(memory):
        memory.memory["count"] = 2
        raise KeyboardInterrupt
    assert memory.memory == {"count": 1}
