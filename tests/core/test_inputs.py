"""Errors name the thing, and leave everything as it was; gradients that are not finite are no
errors."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from dbmtl import DBMTL, EMA, IMTLL, Balancer, Identity, Log, MaxNorm, Sum, make_balancer
from dbmtl.core.aggregator import GramianAggregator
from dbmtl.core.inputs import ScaleWatch, read_losses
from dbmtl.gradient_balancing.nash_mtl import NashMTL

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
        r"the loss of task 'normal' is nan; it must be finite.* \(a mean over no labels is nan: "
        r"give None for that task\)$",
    ),
    "infinite": (
        db_mtl,
        bad(math.inf),
        FloatingPointError,
        "the loss of task 'normal' is inf;[^(]*$",
    ),
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


def test_a_gradient_that_is_not_finite_is_told_where_no_length_enters_the_weights():
    """The average goes on from finite numbers: the weight alone can say what was left out."""
    model = net()
    shared = model["trunk"]
    balancer = Balancer(Log(), Sum(), shared=shared, num_tasks=3, ema=EMA(0.5))
    balancer.backward(losses_of(model))
    model.zero_grad()
    losses = losses_of(model)
    losses[1].register_hook(lambda g: g * math.inf)
    balancer.backward(losses)
    assert balancer.weights.isnan().tolist() == [False, True, False]
    assert not any(p.grad.isfinite().all() for p in shared.parameters())
    assert all(g.isfinite().all() for row in balancer.ema.rows.values() for g in row.values())


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


@pytest.mark.parametrize("name", ["DTensor", "FlatParameter"])
def test_sharded_parameters_are_refused(name):
    sharded = type(name, (nn.Parameter,), {})(torch.ones(2))
    balancer = DBMTL(shared=[sharded], num_tasks=2)
    with pytest.raises(
        RuntimeError,
        match=f"sharded parameters .{name}, .*FSDP.* are not supported.*Keep the whole",
    ):
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


# --------------------------------------------------------------------- found under hostile testing


@pytest.mark.parametrize("losses", [set, frozenset, lambda losses: dict.fromkeys(losses).keys()])
@pytest.mark.parametrize("method", ["EW", "DB-MTL"])
def test_losses_without_an_order_are_refused(method, losses):
    model = net()
    balancer = make_balancer(method, shared=model["trunk"], num_tasks=3)
    before = snapshot(model, balancer)
    with pytest.raises(TypeError, match="losses must have an order"):
        balancer.backward(losses(losses_of(model)))
    with pytest.raises(TypeError, match="losses must have an order"):
        balancer.accumulate(losses(losses_of(model)), 1)
    same(snapshot(model, balancer), before)
    with pytest.raises(TypeError, match="losses must have an order"):
        balancer.end_epoch({1.0, 2.0, 3.0})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.5, "x", True, None])
@pytest.mark.parametrize("name", ["alpha", "eps", "beta_decay", "beta"])
def test_numbers_that_are_none_are_refused_by_name(name, bad):
    if name == "beta" and bad is None:
        return  # means no average
    with pytest.raises(ValueError, match=f"{name} must be"):
        DBMTL(shared=net()["trunk"], num_tasks=3, **{name: bad})


def test_complex_parameters_are_refused_at_construction():
    trunk = nn.Linear(2, 2, dtype=torch.complex64)
    for method in ("EW", "MGDA", "DB-MTL"):
        with pytest.raises(TypeError, match="complex parameters.*torch.view_as_complex"):
            make_balancer(method, shared=trunk, num_tasks=2)


def in_inference_mode(losses):
    with torch.inference_mode():
        return [loss * 2 for loss in losses]


STRANGE = {
    "complex": (lambda losses: [loss * 1j for loss in losses], TypeError, "loss 0 must be a real"),
    "inference": (in_inference_mode, ValueError, "loss 0 was computed in inference mode"),
    "none": (lambda losses: [None] * 3, ValueError, "all losses are None"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_strange_losses_are_refused_in_words(case):
    change, kind, message = STRANGE[case]
    model = net()
    balancer = DBMTL(shared=model["trunk"], num_tasks=3)
    before = snapshot(model, balancer)
    with pytest.raises(kind, match=message):
        balancer.backward(change(losses_of(model)))
    same(snapshot(model, balancer), before)


def test_losses_without_values_are_refused_where_values_are_looked_at():
    trunk = nn.Linear(2, 2, device="meta")
    losses = list(trunk(torch.empty(1, 2, device="meta"))[0].square())
    with pytest.raises(ValueError, match="no values: they are on the meta device"):
        DBMTL(shared=trunk, num_tasks=2).backward(losses)


def test_a_step_in_inference_mode_is_refused():
    model = net()
    losses = losses_of(model)
    balancer = DBMTL(shared=model["trunk"], num_tasks=3)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="in inference mode"):
        balancer.backward(losses)
    balancer.backward(losses)


@pytest.mark.parametrize("scaler", [3.0, "scaler", object(), torch.nn.Linear(1, 1)])
@pytest.mark.parametrize("method", ["EW", "DB-MTL"])
def test_what_is_no_scaler_is_refused(method, scaler):
    model = net()
    balancer = make_balancer(method, shared=model["trunk"], num_tasks=3)
    with pytest.raises(TypeError, match="scaler must be a torch.amp.GradScaler, got"):
        balancer.backward(losses_of(model), scaler=scaler)
    with pytest.raises(TypeError, match="scaler must be a torch.amp.GradScaler, got"):
        balancer.accumulate(losses_of(model), 1, scaler=scaler)


@pytest.mark.parametrize("method", ["DB-MTL", "MoCo", "ExcessMTL", "MTAdam"])
def test_parameters_that_change_their_type_between_steps_are_noticed(method):
    model = net().float()
    x = torch.randn(6, 4)

    def losses():
        z = model["trunk"](x)
        return [head(z).square().mean() + 0.1 for head in model["heads"]]

    balancer = make_balancer(method, shared=model["trunk"], num_tasks=3)
    balancer.backward(losses())
    balancer.backward(losses())
    state = balancer.state_dict()
    model.double()
    x = x.double()
    with pytest.raises(RuntimeError, match="is torch.float64 on cpu; .* it was torch.float32"):
        balancer.backward(losses())
    if method == "DB-MTL":
        anew = make_balancer(method, shared=model["trunk"], num_tasks=3)
        anew.load_state_dict(state)
        anew.backward(losses())
        assert {g.dtype for row in anew.ema.rows.values() for g in row.values()} == {torch.float64}


def test_parameters_may_change_their_type_where_nothing_is_remembered():
    model = net().float()
    for method in ("EW", "PCGrad", "loss-only"):
        balancer = make_balancer(method, shared=model["trunk"], num_tasks=3)
        for dtype in (torch.float32, torch.float64):
            model.to(dtype)
            z = model["trunk"](torch.ones(6, 4, dtype=dtype))
            balancer.backward([head(z).square().mean() + 0.1 for head in model["heads"]])
            model.zero_grad()


@pytest.mark.parametrize("kind", [RuntimeError, NotImplementedError])
def test_what_cannot_be_batched_says_use_loop(monkeypatch, kind):
    model = net()
    plain = torch.autograd.grad

    def grad(*arguments, is_grads_batched=False, **options):
        if is_grads_batched:
            raise kind("vmap: no batching rule\n  frame #0: c10::Error")
        return plain(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    balancer = DBMTL(shared=model["trunk"], num_tasks=3, grads="batched")
    with pytest.raises(RuntimeError, match="use grads='loop'.*no batching rule$"):
        balancer.backward(losses_of(model))
    assert all(p.grad is None for p in model.parameters()) and balancer.ema.rows == {}


def test_out_of_memory_in_a_batched_pass_stays_what_it_is(monkeypatch):
    def grad(*_, **__):
        raise torch.OutOfMemoryError("no memory is left")

    model = net()
    balancer = DBMTL(shared=model["trunk"], num_tasks=3, grads="batched")
    losses = losses_of(model)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    with pytest.raises(torch.OutOfMemoryError, match="^no memory is left$"):
        balancer.backward(losses)


# ------------------------------------------------------------------- scales that nobody moves


def trained(balancer, model, optimizer, steps):
    for seed in range(steps):
        balancer.backward(losses_of(model, seed))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("method", ["UW", "IMTL-L"])
def test_copies_of_model_and_balancer_give_no_false_alarm(tmp_path, method, before, copied):
    model = net()
    balancer = make_balancer(method, shared=model["trunk"], num_tasks=3)
    both = [*model.parameters(), *balancer.parameters()]
    trained(balancer, model, torch.optim.SGD(both, lr=1e-3), before)
    pair = (model, balancer)
    if copied == "deepcopy":
        model, balancer = copy.deepcopy(pair)
    elif copied == "pickle":
        model, balancer = pickle.loads(pickle.dumps(pair))
    else:
        torch.save(pair, tmp_path / "pair.pt")
        model, balancer = torch.load(tmp_path / "pair.pt", weights_only=False)
    both = [*model.parameters(), *balancer.parameters()]
    trained(balancer, model, torch.optim.SGD(both, lr=1e-3), 4)


def test_scales_whose_gradients_are_cleared_by_hand_are_cared_for():
    model = net()
    balancer = make_balancer("UW", shared=model["trunk"], num_tasks=3)
    optimizer = torch.optim.SGD([*model.parameters(), *balancer.parameters()], lr=1e-3)
    for seed in range(5):
        balancer.backward(losses_of(model, seed))
        for p in balancer.parameters():
            p.grad = None  # not yet: they move later
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("to_none", [True, False])
def test_scales_in_an_optimizer_that_stands_still_are_cared_for(to_none):
    model = net()
    balancer = make_balancer("UW", shared=model["trunk"], num_tasks=3)
    scales = torch.optim.SGD(balancer.parameters(), lr=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for seed in range(5):
        balancer.backward(losses_of(model, seed))
        optimizer.step()
        scales.step()
        scales.zero_grad(set_to_none=to_none)
        optimizer.zero_grad(set_to_none=to_none)


@pytest.mark.parametrize("copied", [False, True])
def test_forgotten_scales_are_noticed_also_in_a_copy(copied):
    model = net()
    balancer = make_balancer("UW", shared=model["trunk"], num_tasks=3)
    trained(balancer, model, torch.optim.SGD(model.parameters(), lr=1e-3), 1)
    if copied:
        model, balancer = pickle.loads(pickle.dumps((model, balancer)))
    with pytest.raises(RuntimeError, match="learned scales got gradients but never moved"):
        trained(balancer, model, torch.optim.SGD(model.parameters(), lr=1e-3), 5)


def test_equal_weighting_through_a_trunk_that_a_reentrant_checkpoint_hides():
    """The graph shows no parameter of the trunk; a task beside it is still told apart."""
    model = net()
    plain = net()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def losses(model, reentrant):
        z = checkpoint(model["trunk"], x, use_reentrant=True) if reentrant else model["trunk"](x)
        return [head(z).square().mean() + 0.1 for head in model["heads"]]

    balancer = make_balancer("EW", shared=model["trunk"], num_tasks=3)
    balancer.backward(losses(model, True))
    sum(losses(plain, False)).backward()
    assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    alone = model["heads"][1](torch.ones(6, 5, dtype=torch.float64)).square().mean()
    with pytest.raises(ValueError, match="the loss of task 'normal' does not reach any shared"):
        first, _, last = losses(model, True)
        balancer = make_balancer("EW", shared=model["trunk"], num_tasks=3)
        balancer.backward(dict(zip(NAMES, [first, alone, last], strict=True)))


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_reentrant_checkpoint_between_the_updates_of_nash_mtl(max_norm):
    """Such a step is one ordinary pass, unless its direction may have to be shortened."""
    model = net()
    aggregator = NashMTL(max_norm=max_norm, update_every=2)
    balancer = Balancer(Identity(), aggregator, shared=model["trunk"], num_tasks=3)
    balancer.backward(losses_of(model))
    x = torch.randn(6, 4, dtype=torch.float64)
    z = checkpoint(model["trunk"][1], model["trunk"][0](x), use_reentrant=True)
    losses = [head(z).square().mean() for head in model["heads"]]
    if max_norm is None:
        balancer.backward(losses)
        assert balancer.step == 2
    else:
        with pytest.raises(RuntimeError, match="^reentrant checkpointing cannot give task grad"):
            balancer.backward(losses)


def test_a_loss_that_counts_nothing_may_have_any_shape():
    """Of a rank without a sample of the task it may be the mean of nothing, or nothing at all."""
    first, second, third = losses_of(net())
    losses = [first, second, third.expand(0)]
    batch = read_losses(losses, 3, only=[0], may_be_empty=True)
    assert list(batch.idle_roots) == [1]
    assert batch.own_tasks == [0]


@pytest.mark.parametrize("form", [list, torch.stack])
def test_a_task_without_a_loss_has_the_value_one(form):
    losses = losses_of(net())
    values = read_losses(form(losses), 3, only=[0, 2]).values
    assert_close(values, torch.stack([losses[0], torch.ones(()).double(), losses[2]]).detach())


def test_a_rank_has_no_share_in_a_task_that_no_rank_has():
    batch = read_losses([loss if t < 2 else None for t, loss in enumerate(losses_of(net()))], 3)
    counts = torch.tensor([8.0, 4.0, 0.0])
    joined = batch.joined(torch.ones(3), counts, torch.tensor([2.0, 4.0, 0.0]), [0, 1])
    assert joined.shares.tolist() == [0.25, 1.0, 0.0]
    assert joined.present == joined.own_tasks == [0, 1]
    assert joined.roots == batch.roots


def test_one_of_two_scales_that_was_forgotten_is_counted():
    moving, forgotten, weight = (torch.ones(2, requires_grad=True) for _ in range(3))
    watch = ScaleWatch()
    watch.look([moving, forgotten], [weight])
    for scale in (moving, forgotten):
        scale.grad = torch.ones(2)
    with torch.no_grad():
        moving += 0.1
        weight += 0.1
    with pytest.raises(RuntimeError, match="1 learned scales got gradients but never moved"):
        watch.look([moving, forgotten], [weight])
    assert not watch.is_over
    with torch.no_grad():
        forgotten += 0.1
    watch.look([moving, forgotten], [weight])
    assert watch.is_over


def test_a_balancer_that_loads_its_state_after_a_conversion_goes_on():
    """The state takes the type that the parameters have now; what was noted before is forgotten."""
    model = net().float()

    def losses(dtype):
        z = model["trunk"](torch.ones(6, 4, dtype=dtype))
        return [head(z).square().mean() + 0.1 for head in model["heads"]]

    balancer = DBMTL(shared=model["trunk"], num_tasks=3)
    balancer.backward(losses(torch.float32))
    state = balancer.state_dict()
    model.double()
    with pytest.raises(RuntimeError, match="make a balancer and load its state"):
        balancer.backward(losses(torch.float64))
    balancer.load_state_dict(state)
    model.zero_grad()
    balancer.backward(losses(torch.float64))
    assert {g.dtype for row in balancer.ema.rows.values() for g in row.values()} == {torch.float64}
