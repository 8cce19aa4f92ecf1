"""A task may be missing in a step: methods work on those present, and the others' state stays."""

import pytest
import torch
from helpers.methods import BASES, FEATURES, RANDOM, THREE, Net, every, make, same
from torch.testing import assert_close

from dbmtl import DBMTL, make_balancer

NAMES = ("a", "b", "c")
REFUSE = {  # what they remember or aim at needs all tasks
    "DWA": "DWA", "IGBv2": "IGBv2", "FAMO": "FAMO", "STCH": "STCH", "GradNorm": "GradNorm",
    "MetaBalance": "MetaBalance", "MoCo": "MoCo", "ExcessMTL": "ExcessMTL", "SDMGrad": "SDMGrad",
    "MoDo": "MoDo",
}  # fmt: skip
SKIP = [name for name in BASES if name not in REFUSE]


def step(balancer, model, seed=0, missing=(), **options):
    zs = [model.features(3 * seed + k) for k in range(balancer.aggregator.num_batches)]
    batches = []
    for z in zs:
        losses = enumerate(model.losses(z))
        batches.append([None if t in missing else loss for t, loss in losses])
    features = {"features": zs[0]} if balancer.level == "features" else {}
    balancer.backward(*batches, **features, **options)


def follow(balancer, model):
    for p in [*model.parameters(), *balancer.parameters()]:
        p.grad = None


def everything(balancer, model):
    return model.grads(), balancer.state_dict(), balancer.slopes, balancer.weights


def test_every_method_skips_or_refuses():
    for name in BASES:
        balancer = make(name, Net())
        can_skip = balancer.transform.can_skip_tasks and balancer.aggregator.can_skip_tasks
        assert can_skip == (name not in REFUSE)


@every
def test_with_all_tasks_present_nothing_is_special(name):
    plain = Net()
    special = Net()
    a = make(name, plain)
    b = make(name, special, missing="skip")
    for seed in range(3):
        step(a, plain, seed)
        names = ("size", "size2", "size3")[: b.aggregator.num_batches]
        step(b, special, seed, **dict.fromkeys(names, [4.0, 1.0, 2.0]))
        assert same(everything(a, plain), everything(b, special))
        for balancer, model in ((a, plain), (b, special)):
            follow(balancer, model)
            balancer.after_step(model.losses(model.features(seed + 5)))
            balancer.end_epoch()
    assert b.seen.tolist() == [3, 3, 3]


@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("name", [name for name in SKIP if name != "RLW"])  # a weight for each task
def test_a_step_without_a_task_is_that_of_the_others(name, missing):
    """No trace of the missing task: the numbers of a balancer that has never heard of it."""
    model = Net()
    smaller = Net(tasks=tuple(t for t in range(3) if t not in missing))
    balancer = make(name, model)
    fewer = make(name, smaller)
    for seed in range(1 if name in RANDOM else 3):
        step(balancer, model, seed, missing)
        step(fewer, smaller, seed)
        present = list(smaller.tasks)
        assert_close(model.shared_gradient(), smaller.shared_gradient(), rtol=1e-9, atol=1e-12)
        for t, head in zip(present, smaller.heads, strict=True):
            assert_close(model.heads[t].grad, head.grad)
        assert all(model.heads[t].grad is None for t in missing)
        assert_close(balancer.slopes[present], fewer.slopes)
        assert (balancer.slopes[list(missing)] == 0).all()
        if fewer.weights is not None:
            assert_close(balancer.weights[present], fewer.weights)
            assert (balancer.weights[list(missing)] == 0).all()
        follow(balancer, model)
        follow(fewer, smaller)
    assert balancer.seen.tolist() == [0 if t in missing else seed + 1 for t in range(3)]


def test_random_weights_are_those_of_all_tasks():
    model = Net()
    whole = Net()
    balancer = make("RLW", model)
    other = make("RLW", whole)
    step(balancer, model, 0, (1,))
    step(other, whole, 0)
    assert_close(balancer.slopes[[0, 2]], other.slopes[[0, 2]])
    assert same(balancer.transform.memory, other.transform.memory)


@pytest.mark.parametrize("name", ["DB-MTL", "gradient-only", "MTAdam", "GradVac", "UW", "IMTL"])
def test_what_is_remembered_of_a_missing_task_stays(name):
    model = Net()
    balancer = make(name, model)
    step(balancer, model, 0)
    before = of_task_1(balancer)
    step(balancer, model, 1, (1,))
    assert same(of_task_1(balancer), before)
    step(balancer, model, 2)
    assert not same(of_task_1(balancer), before)


def of_task_1(balancer):
    if balancer.ema:
        return {i: average.clone() for i, average in balancer.ema.rows[1].items()}
    memory = balancer.aggregator.memory
    if "rho" in memory:
        return [rho[1].clone() for rho in memory["rho"].values()]
    if "shared" in memory:
        return [memory["shared"][1], memory["heads"][1]]
    return [p.grad[1].clone() for p in balancer.parameters()]


# forms


def named(losses):
    return dict(zip(NAMES, losses, strict=True))


def absent_name(losses):
    return {name: loss for name, loss in named(losses).items() if name != "b"}


def with_none(losses):
    return [losses[0], None, losses[2]]


FORMS = {
    "None in a list": lambda b, ls: b.backward(with_none(ls)),
    "None in a tuple": lambda b, ls: b.backward(tuple(with_none(ls))),
    "size 0": lambda b, ls: b.backward(ls, size=[1, 0, 1], missing="skip"),
    "None and size 0": lambda b, ls: b.backward(with_none(ls), size=[2, 0, 2]),
    "size 0, stacked": lambda b, ls: b.backward(torch.stack(ls), size=[1, 0, 1], missing="skip"),
    "size 0, not a number": lambda b, ls: b.backward(
        [ls[0], ls[1] * float("nan"), ls[2]], size=[1, 0, 1], missing="skip"
    ),
}
NAMED = {
    "None": lambda b, ls: b.backward(named(with_none(ls))),
    "absent": lambda b, ls: b.backward(absent_name(ls), missing="skip"),
    "another order": lambda b, ls: b.backward(
        dict(reversed(absent_name(ls).items())), missing="skip"
    ),
    "size 0": lambda b, ls: b.backward(named(ls), size={"a": 1, "b": 0, "c": 1}, missing="skip"),
    "size of all": lambda b, ls: b.backward(
        absent_name(ls), size={"a": 2, "b": 3, "c": 2}, missing="skip"
    ),
}


def after(form, names=False):
    model = Net()
    balancer = make("DB-MTL", model)
    losses = model.losses(model.features(0))
    balancer.backward(named(losses) if names else losses)
    form(balancer, model.losses(model.features(1)))
    state = balancer.state_dict()
    return model.grads(), state["ema"], state["missed"], balancer.slopes, balancer.weights


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_step(form):
    assert same(after(FORMS[form]), after(FORMS["None in a list"]))


@pytest.mark.parametrize("form", NAMED)
def test_every_form_by_name_gives_the_same_step(form):
    assert same(after(NAMED[form], names=True), after(FORMS["None in a list"]))


@pytest.mark.parametrize("grads", ["loop", "split", "batched"])
@pytest.mark.parametrize("name", [name for name in SKIP if name not in FEATURES | THREE])
def test_micro_batches_without_a_task(name, grads):
    model = Net()
    whole = Net()
    pieces = make(name, model, missing="skip", grads=grads)
    at_once = make(name, whole, grads=grads)
    losses = [model.losses(model.features(seed)) for seed in (0, 1)]
    pieces.accumulate(with_none(losses[0]), 2)
    pieces.accumulate([losses[1][0], losses[1][1] * float("nan"), losses[1][2]], [2, 0, 2])
    pieces.backward()
    pairs = zip(*(whole.losses(whole.features(seed)) for seed in (0, 1)), strict=True)
    at_once.backward(with_none([(one + other) / 2 for one, other in pairs]))
    for mine, expected in zip(model.grads(), whole.grads(), strict=True):
        if expected is None:
            assert mine is None
        else:
            assert_close(mine, expected, rtol=1e-9, atol=1e-12)
    assert pieces.seen.tolist() == [1, 0, 1]


# errors


@pytest.mark.parametrize("name", REFUSE)
def test_methods_that_need_all_tasks_say_so_by_name(name):
    model = Net()
    balancer = make(name, model)
    before = balancer.state_dict()
    with pytest.raises(ValueError, match=rf"{REFUSE[name]} needs a loss of every task.*\[1\]"):
        step(balancer, model, 0, (1,))
    assert same(balancer.state_dict(), before)
    assert all(g is None for g in model.grads())


def test_kept_weights_are_those_of_all_tasks():
    model = Net()
    balancer = make("Nash-MTL", model, update_every=3)
    with pytest.raises(ValueError, match="NashMTL needs a loss of every task"):
        step(balancer, model, 0, (1,))


STRICT = {
    "a forgotten name": (lambda b, ls: b.backward(absent_name(ls)), ValueError, "missing now"),
    "an unknown name": (
        lambda b, ls: b.backward({"a": ls[0], "x": ls[1]}, missing="skip"), ValueError, "unknown",
    ),
    "size 0": (
        lambda b, ls: b.backward(named(ls), size=dict(zip(NAMES, (1, 0, 1), strict=True))),
        ValueError, r"nothing to count for tasks \['b'\]",
    ),
    "all sizes 0": (
        lambda b, ls: b.backward(named(ls), size=0, missing="skip"), ValueError, "nothing to count",
    ),
    "all None": (lambda b, ls: b.backward([None] * 3), ValueError, "all losses are None"),
    "too few": (lambda b, ls: b.backward(ls[:2]), ValueError, "expected 3 losses, got 2"),
    "a word": (
        lambda b, ls: b.backward(named(ls), missing="ignore"), ValueError, "missing must be one of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STRICT)
def test_a_forgotten_loss_is_an_error(case):
    call, kind, message = STRICT[case]
    model = Net()
    balancer = make("DB-MTL", model)
    balancer.backward(named(model.losses(model.features(0))))
    follow(balancer, model)
    before = balancer.state_dict()
    with pytest.raises(kind, match=message):
        call(balancer, model.losses(model.features(1)))
    assert same(balancer.state_dict(), before) and all(g is None for g in model.grads())


def test_the_balancer_can_be_told_once():
    model = Net()
    balancer = make_balancer("DB-MTL", shared=model.trunk, num_tasks=3, missing="skip")
    for seed in range(3):
        losses = named(model.losses(model.features(seed)))
        if seed == 1:
            del losses["c"]
        balancer.backward(losses)
    assert balancer.seen.tolist() == [3, 3, 2]
    with pytest.raises(ValueError, match="missing must be one of"):
        DBMTL(shared=model.trunk, num_tasks=3, missing="no")


def test_a_state_with_missing_tasks_is_loaded():
    model = Net()
    balancer = make("DB-MTL", model)
    step(balancer, model, 0, (2,))
    step(balancer, model, 1)
    other = make("DB-MTL", Net())
    other.load_state_dict(balancer.state_dict())
    assert other.seen.tolist() == balancer.seen.tolist() == [2, 2, 1]
    assert "missed" not in make("DB-MTL", Net()).state_dict()


def test_a_state_with_missing_tasks_stays_as_it_was_saved():
    """Neither the balancer that saved it nor one that loaded it counts on in the state."""
    model = Net()
    balancer = make("DB-MTL", model)
    step(balancer, model, 0, (2,))
    state = balancer.state_dict()
    step(balancer, model, 1, (2,))
    assert state["missed"].tolist() == [0, 0, 1]
    another = Net()
    other = make("DB-MTL", another)
    other.load_state_dict(state)
    step(other, another, 1, (2,))
    assert state["missed"].tolist() == [0, 0, 1]
    assert balancer.state_dict()["missed"].tolist() == [0, 0, 2]
    assert other.state_dict()["missed"].tolist() == [0, 0, 2]


def test_no_warning_of_a_forgotten_layer_comes_from_a_missing_task(recwarn):
    model = Net()
    balancer = make("DB-MTL", model)
    for seed, missing in enumerate([(0,), (1,), (2,), ()]):
        step(balancer, model, seed, missing)
    assert not recwarn.list
    assert balancer.partition.is_complete
