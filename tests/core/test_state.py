"""`load_state_dict` is all or nothing, for every method."""

import copy

import pytest
import torch
from helpers.methods import Net, every_base, follow, make, same, step

PARTS = ["num_tasks", "shapes", "method", "step", "names", "nonfinite", "transform", "aggregator"]


def used(name, seeds=range(3)):
    """A model and a balancer after a few steps."""
    model = Net()
    balancer = make(name, model)
    for seed in seeds:
        step(balancer, model, seed)
        follow(balancer, model, seed)
    return model, balancer


def without(part):
    def change(state):
        del state[part]

    return change


def replaced(part, value):
    def change(state):
        state[part] = value

    return change


def wrong_shape(state):
    row = state["ema"][1]
    row[2] = row[2][:-1]


def wrong_position(state):
    state["ema"][1][4] = torch.zeros(3)  # there are four shared parameters


def wrong_task(state):
    state["ema"][3] = state["ema"][0]  # there are three tasks


def no_tensor(state):
    state["ema"][0][0] = [1.0]


BROKEN = {
    **{f"without {part}": without(part) for part in [*PARTS, "ema"]},
    "step": replaced("step", -1),
    "step of text": replaced("step", "3"),
    "two counts": replaced("nonfinite", torch.zeros(2, dtype=torch.long)),
    "counts in a list": replaced("nonfinite", [0, 0, 0]),
    "two names": replaced("names", ("a", "b")),
    "transform without parts": replaced("transform", {}),
    "aggregator without parts": replaced("aggregator", {}),
    "no averages": replaced("ema", None),
    "shape of an average": wrong_shape,
    "position of an average": wrong_position,
    "task of an average": wrong_task,
    "average in a list": no_tensor,
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_state_that_is_not_whole_changes_nothing(case):
    _, source = used("DB-MTL")
    model, balancer = used("DB-MTL", range(5, 9))
    before = copy.deepcopy(balancer.state_dict())
    state = source.state_dict()
    BROKEN[case](state)
    with pytest.raises((ValueError, RuntimeError, KeyError)) as error:
        balancer.load_state_dict(state)
    assert str(error.value) and not isinstance(error.value, KeyError)
    assert same(balancer.state_dict(), before)
    step(balancer, model, 1)


@every_base
def test_a_state_without_a_part_changes_nothing(name):
    _, source = used(name)
    model, balancer = used(name, range(5, 7))
    before = copy.deepcopy(balancer.state_dict())
    for part in [*PARTS, "ema"]:
        state = source.state_dict()
        del state[part]
        with pytest.raises(ValueError, match=f"the state of a balancer lacks .'{part}'"):
            balancer.load_state_dict(state)
        assert same(balancer.state_dict(), before)


@every_base
def test_averages_where_there_are_none_are_refused(name):
    _, source = used(name)
    state = source.state_dict()
    state["ema"] = {} if state["ema"] is None else None
    with pytest.raises(ValueError, match="ema in the state must hold averages where, and only"):
        used(name)[1].load_state_dict(state)


@every_base
def test_loading_forgets_what_belongs_to_the_time_before(name):
    """Flags of bad losses and the watch on scales are of the steps before, not of the state."""
    _, source = used(name)
    model, balancer = used(name, range(5, 7))
    balancer.check = "later"
    balancer._bad_losses = torch.ones(3, dtype=torch.bool)
    watch = balancer._scale_watch
    balancer.load_state_dict(source.state_dict())
    balancer.verify()
    assert balancer._scale_watch is not watch
    assert same(balancer.state_dict(), source.state_dict())


def test_a_loaded_state_is_a_copy():
    model, source = used("DB-MTL")
    state = source.state_dict()
    before = copy.deepcopy(state)
    _, balancer = used("DB-MTL", range(1))
    balancer.load_state_dict(state)
    balancer.ema.rows[0][0].zero_()
    balancer.nonfinite += 1
    assert same(state, before)
    state["ema"][0][0].fill_(7)
    assert same(source.state_dict(), before)


def entries(nested, path=()):
    """The paths of everything in a nested state that is no container."""
    if isinstance(nested, (dict, list, tuple)):
        items = nested.items() if isinstance(nested, dict) else enumerate(nested)
        for key, value in items:
            yield from entries(value, (*path, key))
    else:
        yield path, nested


def put(nested, path, value):
    """Replace an entry; False where a tuple holds it."""
    for key in path[:-1]:
        nested = nested[key]
    if isinstance(nested, tuple):
        return False
    nested[path[-1]] = value
    return True


@every_base
@pytest.mark.parametrize("wrong", [torch.zeros(7, 7), "x"], ids=["shape", "type"])
def test_no_entry_of_another_shape_or_type_is_accepted(name, wrong):
    """Of what a method remembers too: a random stream, a mean, the moments of an agent."""
    _, source = used(name)
    _, balancer = used(name, range(5, 7))
    before = copy.deepcopy(balancer.state_dict())
    for path, value in entries(source.state_dict()):
        state = source.state_dict()
        if value is None or type(value) is type(wrong) is str or not put(state, path, wrong):
            continue
        with pytest.raises(ValueError):
            balancer.load_state_dict(state)
        assert same(balancer.state_dict(), before), path
