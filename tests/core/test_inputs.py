"""Errors name the thing, and leave everything as it was; gradients that are not finite are no
errors."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from dbmtl import DBMTL, EMA, IMTLL, Balancer, Log, MaxNorm, make_balancer
from dbmtl.core.aggregator import GramianAggregator

MODES = ["loop", "split", "batched"]
NAMES = ("depth", "normal", "edge")


def net(tasks=3):
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    return nn.ModuleDict(
        {"trunk": trunk, "heads": nn.ModuleList(nn.Linear(5, 1) for _ in range(tasks))}
    ).double()


def losses_of(model, seed=0):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = model["trunk"](x)
    return [head(z).square().mean() + 0.1 for head in model["heads"]]


def named(losses):
    return dict(zip(NAMES, losses, strict=True))


def snapshot(model, balancer):
    """Everything that a step changes, copied."""
    copy = lambda x: x.clone() if isinstance(x, torch.Tensor) else x  # noqa: E731
    parameters = [*model.parameters(), *balancer.parameters()]
    ema = (
        {t: {i: g.clone() for i, g in row.items()} for t, row in balancer.ema.rows.items()}
        if balancer.ema
        else {}
    )
    return {
        "grad": [copy(p.grad) for p in parameters],
        "data": [copy(p.data) for p in parameters],
        "ema": ema,
        "step": copy(balancer.step),
        "nonfinite": balancer.nonfinite.clone(),
        "slopes": copy(balancer.slopes),
        "weights": copy(balancer.weights),
        "describe": balancer.describe(),
    }


def same(a, b):
    """Deep equality, None and keys included."""
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, torch.Tensor):
        assert_close(a, b, rtol=0, atol=0)
    else:
        assert a == b


class Unsolved(GramianAggregator):
    """A solver that fails when told to."""

    needs, may_fail, failing = "gramian", True, False

    def forward(self, gramian, losses):
        if self.failing:
            raise RuntimeError("the solver did not converge")
        return torch.ones_like(losses)


def bad(value):
    def change(losses, balancer):
        losses[1] = losses[1] * 0 + value
        return named(losses)

    return change


def detached(losses, balancer):
    losses[1] = losses[1].detach()
    return named(losses)


def past_the_trunk(losses, balancer):
    losses[1] = nn.Parameter(torch.ones((), dtype=torch.float64)) * 2
    return named(losses)


def last(change):
    return lambda losses, balancer: [*losses[:2], change(losses[2])]


def renamed(losses, balancer):
    return dict(zip("abc", losses, strict=True))


def fail(losses, balancer):
    balancer.aggregator.failing = True
    return named(losses)


def ew(**k):
    return make_balancer("EW", num_tasks=3, **k)


def db_mtl(**k):
    return DBMTL(num_tasks=3, **k)


def imtl_l(**k):
    return Balancer(IMTLL(3).double(), MaxNorm(), ema=EMA(), num_tasks=3, **k)


def unsolved(**k):
    return Balancer(Log(), Unsolved(), ema=EMA(), num_tasks=3, **k)


ERRORS = {
    "nan": (
        db_mtl,
        bad(math.nan),
        FloatingPointError,
        "the loss of task 'normal' is nan; it must be finite",
    ),
    "infinite": (db_mtl, bad(math.inf), FloatingPointError, "the loss of task 'normal' is inf"),
    "nan, equal weighting": (
        ew,
        bad(math.nan),
        FloatingPointError,
        "the loss of task 'normal' is nan",
    ),
    "negative under log": (
        db_mtl,
        bad(-0.5),
        ValueError,
        "the loss of task 'normal' is -0.5; .*above -1e-08",
    ),
    "exactly -eps": (db_mtl, bad(-1e-8), ValueError, "the loss of task 'normal' is -1e-08"),
    "zero under IMTL-L": (
        imtl_l,
        bad(0.0),
        ValueError,
        "the loss of task 'normal' is 0; .*positive",
    ),
    "too few": (db_mtl, lambda losses, b: losses[:2], ValueError, "expected 3 losses, got 2"),
    "too many": (
        db_mtl,
        lambda losses, b: [*losses, losses[0]],
        ValueError,
        "expected 3 losses, got 4",
    ),
    "none": (db_mtl, lambda losses, b: [], ValueError, "expected 3 losses, got 0"),
    "matrix": (
        db_mtl,
        lambda losses, b: torch.stack(losses)[None],
        ValueError,
        r"shape \[T\], got \[1, 3\]",
    ),
    "no scalar": (
        db_mtl,
        last(lambda loss: loss.expand(2)),
        ValueError,
        r"'edge' must be a scalar, got shape \[2\]",
    ),
    "a number": (
        db_mtl,
        last(lambda loss: 0.5),
        (TypeError, ValueError),
        "loss 'edge' must be a tensor, got 0.5",
    ),
    "detached": (db_mtl, detached, ValueError, "loss 'normal' does not require grad"),
    "misses shared": (
        db_mtl,
        past_the_trunk,
        ValueError,
        "the loss of task 'normal' does not reach any shared",
    ),
    "other names": (db_mtl, renamed, ValueError, r"missing now: \['depth'"),
    "solver": (unsolved, fail, RuntimeError, "did not converge"),
}


@pytest.mark.parametrize("existing", ["fresh", "zero", "kept"])
@pytest.mark.parametrize("grads", MODES)
@pytest.mark.parametrize("error", ERRORS)
def test_after_an_error_everything_is_as_before(error, grads, existing):
    make, change, kind, message = ERRORS[error]
    model = net()
    balancer = make(shared=model["trunk"], grads=grads)
    balancer.backward(named(losses_of(model)))
    if existing != "kept":
        model.zero_grad(set_to_none=existing == "fresh")
    before = snapshot(model, balancer)
    with pytest.raises(kind, match=message):
        balancer.backward(change(losses_of(model, 1), balancer))
    same(snapshot(model, balancer), before)


@pytest.mark.parametrize(
    "error", ["nan", "negative under log", "too few", "misses shared", "solver"]
)
def test_after_an_error_training_goes_on_as_if_it_never_happened(error):
    make, change, kind, _ = ERRORS[error]
    results = []
    for stumble in (True, False):
        model = net()
        balancer = make(shared=model["trunk"])
        for seed in range(3):
            if stumble:
                with pytest.raises(kind):
                    balancer.backward(change(losses_of(model, 7), balancer))
                balancer.aggregator.failing = False
            balancer.backward(named(losses_of(model, seed)))
        results.append(snapshot(model, balancer))
    same(*results)


def test_a_loss_of_zero_is_legal():
    theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    balancer = DBMTL(shared=[theta], num_tasks=2)
    balancer.backward([theta.square().sum(), theta[0] + 1])
    assert_close(balancer.slopes, torch.tensor([1e8, 1.0]).double())
    assert theta.grad.isfinite().all() and theta.grad[0] > 0


# ------------------------------------------------------------------------------------------- check


@pytest.mark.parametrize("method", ["EW", "DB-MTL", "IMTL-L"])
@pytest.mark.parametrize("check", ["later", "off"])
def test_check_never_changes_the_numbers(check, method):
    results = []
    for chosen in ("now", check):
        model = net()
        balancer = make_balancer(method, shared=model["trunk"], num_tasks=3, check=chosen)
        for seed in range(4):
            balancer.backward(losses_of(model, seed))
        results.append([p.grad for p in model.parameters()])
    assert_close(*results, rtol=1e-6 if method == "IMTL-L" else 1e-13, atol=1e-14)


def test_check_later_names_the_tasks_when_asked():
    model = net()
    balancer = DBMTL(shared=model["trunk"], num_tasks=3, check="later")
    balancer.verify()
    balancer.backward(named(losses_of(model)))
    balancer.verify()
    for value in (math.nan, -1.0):
        balancer.backward(bad(value)(losses_of(model), balancer))
        balancer.backward(named(losses_of(model)))
        with pytest.raises(FloatingPointError, match=r"losses of tasks \['normal'\]"):
            balancer.verify()
        balancer.verify()


@pytest.mark.parametrize("check", ["later", "off"])
def test_a_nan_loss_that_is_not_checked_reaches_grad_but_not_the_average(check):
    model = net()
    balancer = DBMTL(shared=model["trunk"], num_tasks=3, check=check)
    balancer.backward(losses_of(model))
    kept = {t: {i: g.clone() for i, g in row.items()} for t, row in balancer.ema.rows.items()}
    losses = losses_of(model, 1)
    losses[1] = losses[1] * math.nan
    balancer.backward(losses)
    assert not model["trunk"][0].weight.grad.isfinite().any()
    same(balancer.ema.rows[1], kept[1])
    assert balancer.nonfinite.tolist() == [0, 1, 0]


# ----------------------------------------------------------------------- gradients without a limit


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["everywhere", "one element"])
@pytest.mark.parametrize("grads", MODES)
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(grads, where, value):
    model = net()
    balancer = DBMTL(shared=model["trunk"], num_tasks=3, grads=grads)
    balancer.backward(losses_of(model))
    model.zero_grad()
    kept = {t: {i: g.clone() for i, g in row.items()} for t, row in balancer.ema.rows.items()}
    factor = torch.full((5,), 1.0 if where == "one element" else value, dtype=torch.float64)
    factor[2] = value
    x = torch.randn(6, 4, dtype=torch.float64)
    z, losses = model["trunk"](x), []
    for t, head in enumerate(model["heads"]):
        entry = z * 1.0
        if t == 1:
            entry.register_hook(lambda g: g * factor)
        losses.append(head(entry).square().mean() + 0.1)
    balancer.backward(losses)
    assert balancer.nonfinite.tolist() == [0, 1, 0]
    assert not all(
        p.grad.isfinite().all() for p in model["trunk"].parameters()
    )  # so that a GradScaler skips
    same(balancer.ema.rows[1], kept[1])
    assert all(g.isfinite().all() for row in balancer.ema.rows.values() for g in row.values())
    assert all((balancer.ema.rows[t][0] != kept[t][0]).any() for t in (0, 2))
    model.zero_grad()
    balancer.backward(losses_of(model))
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_first_gradient_that_is_not_finite(beta):
    model = net()
    balancer = DBMTL(shared=model["trunk"], num_tasks=3, beta=beta)
    losses = losses_of(model)
    losses[2].register_hook(lambda g: g * math.inf)
    balancer.backward(losses)
    assert not model["trunk"][0].weight.grad.isfinite().all()
    assert balancer.nonfinite.tolist() == [0, 0, 1]
    model.zero_grad()
    balancer.backward(losses_of(model))
    assert model["trunk"][0].weight.grad.isfinite().all()


# ----------------------------------------------------------------------------------- not supported


def test_more_than_one_process_is_refused(monkeypatch):
    model = net()
    balancer = DBMTL(shared=model["trunk"], num_tasks=3)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for call in (balancer.backward, lambda losses: balancer.accumulate(losses, 1)):
        with pytest.raises(RuntimeError, match="2 processes: .*not supported"):
            call(losses_of(model))
    assert model["trunk"][0].weight.grad is None
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    balancer.backward(losses_of(model))


@pytest.mark.parametrize("name", ["DTensor", "FlatParameter"])
def test_sharded_parameters_are_refused(name):
    sharded = type(name, (nn.Parameter,), {})(torch.ones(2))
    balancer = DBMTL(shared=[sharded], num_tasks=2)
    with pytest.raises(RuntimeError, match=f"sharded parameters .{name}, FSDP. are not supported"):
        balancer.backward([sharded.sum(), sharded.square().sum()])


@pytest.mark.parametrize("method", ["EW", "DB-MTL"])
def test_reentrant_checkpoints_give_no_task_gradients_and_the_others_work(method):
    model = net()
    plain = net()
    x = torch.randn(6, 4, dtype=torch.float64)

    def losses(reentrant):
        z = checkpoint(model["trunk"][1], model["trunk"][0](x), use_reentrant=reentrant)
        return [head(z).square().mean() + 0.1 for head in model["heads"]]

    balancer = make_balancer(method, shared=model["trunk"], num_tasks=3)
    if method == "EW":  # one ordinary backward pass
        balancer.backward(losses(True))
    else:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            balancer.backward(losses(True))
        assert all(p.grad is None for p in model.parameters())
        balancer.backward(losses(False))
    z = plain["trunk"](x)
    make_balancer(method, shared=plain["trunk"], num_tasks=3).backward(
        [head(z).square().mean() + 0.1 for head in plain["heads"]]
    )
    assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
