"""Weights that are used for several steps, and averages that are updated in place."""

import copy
import io

import pytest
import torch
from helpers.methods import BASES, F64, Net, follow, make, same, step
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from dbmtl import (
    DBMTL,
    DWA,
    EMA,
    Balancer,
    CAGrad,
    FairGrad,
    GradVac,
    Identity,
    Log,
    MaxNorm,
    NashMTL,
    Sum,
    make_balancer,
)
from dbmtl.core.aggregator import NormAggregator
from dbmtl.core.task_gradients import loss_edges, task_gradients, trace, weighted_gradients
from dbmtl.experiments.method_labels import check_settings, method_label, parse_method
from dbmtl.experiments.records import configuration
from dbmtl.gradient_balancing.max_norm import equal_norm_weights
from dbmtl.registry import hyperparameters, settings_of

TAKES_IT = [
    name
    for name in BASES
    if "update_every" in settings_of(name) and "update_every" not in hyperparameters(name)
]
every_method = pytest.mark.parametrize("name", TAKES_IT)


def run(balancer, model, seeds, note=None):
    for seed in seeds:
        step(balancer, model, seed)
        if note is not None:
            note.append([*model.grads(), balancer.weights, balancer.slopes])
        follow(balancer, model, seed)


def passes_of(model, balancer, seed):
    """How often a gradient arrives at the trunk in a step."""
    calls = []
    handle = model.trunk[0].register_hook(lambda gradient: calls.append(1))
    step(balancer, model, seed)
    handle.remove()
    return len(calls)


def by_table(model, losses, slopes, weights, head_weights):
    """The gradients of trunk and heads, from T passes."""
    table = task_gradients(losses, list(model.trunk), slopes.to(F64), retain_graph=True)
    columns = zip(*table.shared, strict=True)
    trunk = [sum(w * g for w, g in zip(weights, column, strict=True)) for column in columns]
    heads = [
        gradient * head_weights[t]
        for t, head in enumerate(table.heads)
        for gradient in head.values()
    ]
    return [*trunk, *heads]


# the numbers


@every_method
def test_a_step_between_is_exact(name):
    model = Net()
    balancer = make(name, model, update_every=3)
    run(balancer, model, [0])
    weights = balancer.weights.clone()
    for seed in (1, 2):
        losses = model.losses(model.features(3 * seed))
        assert passes_of(model, balancer, seed) == 1
        assert torch.equal(balancer.weights, weights)
        ones = torch.ones(3, dtype=F64)
        heads = weights if balancer.aggregator.weights_heads else ones
        exact = by_table(model, losses, balancer.slopes, weights, heads)
        assert_close(model.grads(), exact, rtol=1e-12, atol=1e-12)
        follow(balancer, model, seed)
    assert passes_of(model, balancer, 3) == 3


@every_method
def test_every_step_is_as_without_the_option(name):
    seen = []
    for options in ({}, {"update_every": 1}):
        model = Net()
        balancer = make(name, model, **options)
        steps = []
        run(balancer, model, range(4), steps)
        seen.append([steps, balancer.state_dict(), repr(balancer)])
    assert same(*seen) and "kept" not in seen[0][1]


def test_a_weight_of_zero_leaves_its_head_alone():
    model = Net()
    balancer = DBMTL(shared=model.trunk, num_tasks=3, weights=[2, 0, 1], update_every=2)
    run(balancer, model, [0])
    step(balancer, model, 1)
    losses = model.losses(model.features(3))
    exact = by_table(model, losses, balancer.slopes, balancer.weights, torch.ones(3))
    assert balancer.weights[1] == 0
    assert_close(model.grads(), exact, rtol=1e-12, atol=1e-12)
    assert model.heads[1].grad.abs().max() > 0


@pytest.mark.parametrize("weights_heads", [False, True])
def test_a_longest_direction_holds_between_too(weights_heads):
    model = Net()
    fair = FairGrad(max_norm=0.125, weights_heads=weights_heads)
    balancer = Balancer(Identity(), fair, shared=model.trunk, num_tasks=3, update_every=2)
    run(balancer, model, [0])
    step(balancer, model, 1)
    losses = model.losses(model.features(3))
    heads = balancer.weights if weights_heads else torch.ones(3)
    exact = by_table(model, losses, balancer.slopes, balancer.weights, heads)
    assert_close(model.shared_gradient().norm().item(), 0.125)
    trunk = torch.cat([g.reshape(-1) for g in exact[:4]])
    assert_close(model.shared_gradient(), trunk / trunk.norm() / 8, rtol=1e-12, atol=0)
    assert_close(model.grads()[4:], exact[4:], rtol=1e-12, atol=1e-12)


def test_learned_scores_learn_in_measured_steps_and_learned_scales_in_all():
    model = Net()
    gradnorm = make("GradNorm", model, update_every=3, initial="first")
    found = []
    for seed in range(4):
        step(gradnorm, model, seed)
        found.append(gradnorm.aggregator.p.grad is not None)
        follow(gradnorm, model, seed)
    assert found == [True, False, False, True]
    imtl = make("IMTL", model, update_every=3)
    for seed in range(4):
        step(imtl, model, seed)
        assert all(p.grad is not None for p in imtl.parameters())
        follow(imtl, model, seed)


def test_the_loss_axis_learns_in_all_steps():
    """DWA ends an epoch after every second step, measured or not."""
    model = Net()
    transform = DWA(3, window=2)
    balancer = Balancer(transform, MaxNorm(), shared=model.trunk, num_tasks=3, update_every=3)
    epochs = []
    losses = []
    for seed in range(6):
        step(balancer, model, seed)
        epochs.append(transform.means.epoch)
        losses.append(balancer.losses)
    assert epochs == [0, 1, 1, 2, 2, 3]
    assert_close(transform.means.last, (losses[4] + losses[5]).double() / 2)


def test_nash_mtl_by_its_own_option_and_by_the_balancers():
    seen = []
    for own in (True, False):
        model = Net()
        nash = NashMTL(update_every=3 if own else 1)
        options = {} if own else {"update_every": 3}
        balancer = Balancer(Identity(), nash, shared=model.trunk, num_tasks=3, **options)
        steps = []
        run(balancer, model, range(7), steps)
        seen.append(steps)
    assert_close(*seen, rtol=1e-9, atol=1e-12)
    named = make_balancer("Nash-MTL", shared=Net().trunk, num_tasks=3, update_every=3)
    assert named.update_every == 1 and named.aggregator.update_every == 3


def test_the_agent_of_igb_keeps_its_own_option():
    named = make_balancer("IGBv2", shared=Net().trunk, num_tasks=3)
    assert named.transform.timetable.update_every == hyperparameters("IGBv2")["update_every"]


# the average


def test_the_average_advances_at_measured_steps_only_and_k_counts_them():
    model = Net()
    balancer = DBMTL(shared=model.trunk, num_tasks=3, update_every=3)
    by_hand = [None] * 3
    for seed in range(7):
        losses = model.losses(model.features(3 * seed))
        values = torch.stack(losses).detach()
        table = task_gradients(losses, list(model.trunk), 1 / (values + 1e-8), retain_graph=True)
        if seed % 3 == 0:
            beta = 0.5 / (1 + seed // 3) ** 0.5
            for t, row in enumerate(table.shared):
                new = torch.cat([g.reshape(-1) for g in row])
                old = torch.zeros_like(new) if by_hand[t] is None else by_hand[t]
                by_hand[t] = beta * old + (1 - beta) * new
            weights = equal_norm_weights(torch.stack([row.norm() for row in by_hand]))
            direction = sum(w * g for w, g in zip(weights, by_hand, strict=True))
        else:
            flat = [torch.cat([g.reshape(-1) for g in row]) for row in table.shared]
            direction = sum(w * g for w, g in zip(weights, flat, strict=True))
        step(balancer, model, seed)
        assert_close(model.shared_gradient(), direction, rtol=1e-9, atol=1e-12)
        for t, average in enumerate(by_hand):
            row = torch.cat([g.reshape(-1) for g in balancer.ema.rows[t].values()])
            assert_close(row, average, rtol=1e-9, atol=1e-12)
        follow(balancer, model, seed)


# graphs


class Product(torch.autograd.Function):
    """A node of Python, with an input before the tensors that is none."""

    @staticmethod
    def forward(ctx, name, z, w):
        ctx.save_for_backward(z, w)
        return z @ w.T

    @staticmethod
    def backward(ctx, gradient):
        z, w = ctx.saved_tensors
        return None, gradient @ w, gradient.T @ z


def shapes():
    """Losses of three tasks on graphs of unlike shape: {name: (losses, shared)}."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=F64)
    first, second = (nn.Linear(4, 4, dtype=F64) for _ in range(2))
    heads = [nn.Linear(4, 1, dtype=F64) for _ in range(3)]
    z = first(x).tanh()
    deep = second(z).tanh()
    plain = [(head(deep) - 1).square().mean() for head in heads]
    both = [*first.parameters(), *second.parameters()]
    nested = [(head(deep) + 0.5 * head(z) - 1).square().mean() for head in heads]
    again = checkpoint(lambda x: second(first(x).tanh()).tanh(), x, use_reentrant=False)
    own = [nn.Linear(4, 4, dtype=F64) for _ in range(3)]
    slipped = [(head(o(z)) - 1).square().mean() for head, o in zip(heads, own, strict=True)]
    return {
        "trunk and heads": (plain, both),
        "taps at two depths": (nested, both),
        "a forgotten layer": (plain, list(first.parameters())),
        "a head inside": (slipped, [*first.parameters(), *own[0].parameters()]),
        "a loss in another": ([plain[0], plain[0] + plain[1], plain[2]], both),
        "the same loss twice": ([plain[0], plain[0], plain[1]], both),
        "stacked": (torch.stack(plain), both),
        "a checkpoint": ([(head(again) - 1).square().mean() for head in heads], both),
        "nodes of Python": (
            [Product.apply("a", deep, h.weight).square().mean() for h in heads],
            both,
        ),
        "one task": (plain[:1], both),
        "two trunks": ([plain[0], (heads[1](z) - 1).square().mean()], both),
    }


@pytest.mark.parametrize("name", shapes())
@pytest.mark.parametrize("heads", [None, (0.5, 0.0, 3.0)])
def test_one_pass_is_the_table_on_every_graph(name, heads):
    losses, shared = shapes()[name]
    roots = loss_edges(losses)
    tasks = len(roots)
    slopes = torch.tensor([2.0, 0.1, 7.0], dtype=F64)[:tasks]
    weights = torch.tensor([3.0, 1e-12, 0.0], dtype=F64)[:tasks]
    head_weights = None if heads is None else torch.tensor(heads, dtype=F64)[:tasks]
    table = task_gradients(losses, shared, slopes, retain_graph=True)
    found = weighted_gradients(roots, shared, slopes, trace(roots), weights, head_weights)
    for place, p in enumerate(shared):
        exact = sum(w * row[place] for w, row in zip(weights, table.shared, strict=True))
        assert_close(found.pop(p, torch.zeros_like(p)), exact, rtol=1e-12, atol=1e-14)
    exact = {}
    for t, of_head in enumerate(table.heads):
        for leaf, gradient in of_head.items():
            factor = 1.0 if head_weights is None else head_weights[t]
            exact[leaf] = exact.get(leaf, 0) + factor * gradient
    assert set(found) == set(exact)
    for leaf, gradient in exact.items():
        assert_close(found[leaf], gradient, rtol=1e-12, atol=1e-14)


def test_the_hooks_go_also_where_the_pass_raises():
    model = Net()
    losses = model.losses(model.features())
    broken = [Failing.apply(losses[0]), *losses[1:]]
    roots = loss_edges(broken)
    with pytest.raises(RuntimeError, match="no pass"):
        weights = torch.full((3,), 5.0)
        ones = torch.ones(3, dtype=F64)
        weighted_gradients(roots, list(model.trunk), ones, trace(roots), weights, None, True)
    expected = torch.autograd.grad(sum(model.losses(model.features())), model.trunk[0])
    assert_close(torch.autograd.grad(losses[0] + losses[1] + losses[2], model.trunk[0]), expected)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no pass")


class Infinite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def infinite(losses, batch):
    return [losses[0], Infinite.apply(losses[1]), losses[2]]


def failing(losses, batch):
    return [*losses[:2], Failing.apply(losses[2])]


# tasks without a loss


def test_a_missing_task_is_left_out_and_a_new_one_is_measured():
    model = Net()
    balancer = DBMTL(shared=model.trunk, num_tasks=3, update_every=4)

    def counted(tasks, seed):
        calls = []
        handle = model.trunk[0].register_hook(lambda gradient: calls.append(1))
        losses = model.losses(model.features(seed))
        balancer.backward([loss if t in tasks else None for t, loss in enumerate(losses)])
        handle.remove()
        return len(calls)

    assert counted([0, 2], 0) == 2
    weights = balancer.weights.clone()
    assert counted([2], 1) == 1
    assert torch.equal(balancer.weights, weights * torch.tensor([0, 0, 1]))
    assert counted([0, 1, 2], 2) == 3  # task 1 has no weight yet
    assert [counted([0, 1, 2], 3 + i) for i in range(4)] == [1, 1, 1, 3]
    assert balancer.seen.tolist() == [6, 5, 7]


# micro-batches, scaler


def test_micro_batches_get_the_same_weights():
    found = []
    for pieces in (False, True):
        model = Net()
        balancer = DBMTL(shared=model.trunk, num_tasks=3, update_every=3)
        for seed in range(5):
            if pieces:
                balancer.accumulate(model.losses(model.features(seed)), 2)
                balancer.accumulate(model.losses(model.features(seed + 50)), [1, 2, 3])
                balancer.backward()
            else:
                pairs = zip(
                    model.losses(model.features(seed)),
                    model.losses(model.features(seed + 50)),
                    ([2, 1], [2, 2], [2, 3]),
                    strict=True,
                )
                balancer.backward([(m * a + n * b) / (m + n) for a, b, (m, n) in pairs])
            found.append([*model.grads(), balancer.weights])
            follow(balancer, model, seed)
    assert_close(found[:5], found[5:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.125])
def test_a_scaler_changes_nothing_but_the_scale(max_norm, accumulate):
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        model = Net()
        fair = FairGrad(max_norm=max_norm)
        balancer = Balancer(Log(), fair, shared=model.trunk, num_tasks=3, update_every=2)
        for seed in range(2):
            model.zero_grad()
            losses = model.losses(model.features(seed))
            if accumulate:
                balancer.accumulate(losses, 2, scaler=scaler)
            balancer.backward(None if accumulate else losses, scaler=scaler)
        found.append([g / (1 if scaler is None else 2.0**10) for g in model.grads()])
    assert_close(*found, rtol=1e-12, atol=1e-12)


# what is remembered


@every_method
@pytest.mark.parametrize("done", range(1, 5))
def test_a_resumed_cycle_gives_the_same_numbers(name, done):
    model = Net()
    balancer = make(name, model, update_every=3)
    run(balancer, model, range(done))
    buffer = io.BytesIO()
    torch.save([balancer.state_dict(), model.state_dict()], buffer)
    buffer.seek(0)
    state, of_model = torch.load(buffer, weights_only=False)
    resumed_model = Net()
    resumed_model.load_state_dict(of_model)
    resumed = make(name, resumed_model, update_every=3)
    resumed.load_state_dict(state)
    with torch.no_grad():
        for new, old in zip(resumed.parameters(), balancer.parameters(), strict=True):
            new.copy_(old)
    went_on, expected = [], []
    run(resumed, resumed_model, range(done, done + 4), went_on)
    run(balancer, model, range(done, done + 4), expected)
    assert same(went_on, expected) and same(resumed.state_dict(), balancer.state_dict())


def test_a_state_without_weights_measures_next():
    model = Net()
    source = DBMTL(shared=model.trunk, num_tasks=3)
    run(source, model, range(2))
    balancer = DBMTL(shared=model.trunk, num_tasks=3, update_every=4)
    balancer.load_state_dict(source.state_dict())
    assert [passes_of(model, balancer, seed) for seed in range(5)] == [3, 1, 1, 1, 3]
    without = DBMTL(shared=model.trunk, num_tasks=3)
    without.load_state_dict(balancer.state_dict())
    assert passes_of(model, without, 9) == 3
    assert without.state_dict()["kept"] == {"cheap_steps": 3, "answer": None}
    shorter = DBMTL(shared=model.trunk, num_tasks=3, update_every=2)
    shorter.load_state_dict(balancer.state_dict())
    assert [passes_of(model, shorter, seed) for seed in range(2)] == [1, 3]


@pytest.mark.parametrize(
    "part, value",
    [
        ("weights", torch.ones(2)),
        ("weights", None),
        ("heads", [1.0, 1.0, 1.0]),
        ("cheap_steps", -1),
        ("answer", {"weights": torch.ones(3)}),
    ],
)
def test_kept_weights_that_are_not_whole_change_nothing(part, value):
    model = Net()
    balancer = DBMTL(shared=model.trunk, num_tasks=3, update_every=3)
    run(balancer, model, range(2))
    before = balancer.state_dict()
    state = copy.deepcopy(before)
    (state["kept"] if part in state["kept"] else state["kept"]["answer"])[part] = value
    with pytest.raises(ValueError, match="kept in the state"):
        balancer.load_state_dict(state)
    assert same(balancer.state_dict(), before)


def test_a_log_has_what_the_step_knows():
    model = Net()
    balancer = DBMTL(shared=model.trunk, num_tasks=3, update_every=2)
    run(balancer, model, range(2))
    log = balancer.log()
    assert "weight/0" in log and not any(key.startswith("norm/") for key in log)
    assert_close(balancer.effective_weights, balancer.slopes * balancer.weights)
    assert repr(balancer).endswith(", update_every=2)") and "update_every=2" in balancer.describe()


# errors


def test_an_error_in_a_step_between_changes_nothing():
    model = Net()
    balancer = DBMTL(shared=model.trunk, num_tasks=3, update_every=3)
    run(balancer, model, range(2))
    before = copy.deepcopy(balancer.state_dict())
    with pytest.raises(RuntimeError, match="no pass"):
        step(balancer, model, 2, failing)
    assert same(balancer.state_dict(), before) and model.grads() == [None] * 7
    assert passes_of(model, balancer, 2) == 1


def test_weights_that_are_not_finite_are_not_kept():
    model = Net()
    balancer = DBMTL(shared=model.trunk, num_tasks=3, update_every=3)
    step(balancer, model, 0, infinite)
    assert balancer.nonfinite.tolist() == [0, 1, 0] and model.grads()[0].isnan().any()
    model.zero_grad()
    assert passes_of(model, balancer, 1) == 3
    model.zero_grad()
    step(balancer, model, 2, infinite)  # between: it shows in the gradient, and is not counted
    assert not model.grads()[0].isfinite().all() and balancer.nonfinite.tolist() == [0, 1, 0]
    model.zero_grad()
    assert passes_of(model, balancer, 3) == 1


REFUSED = {
    "EW": "losses",
    "UW": "losses",
    "FAMO": "losses",
    "MTAdam": "finished update",
    "MoCo": "direction",
    "GradDrop": "direction",
    "MetaBalance": "direction",
    "MoDo": "two batches",
    "SDMGrad": "two batches",
    "MGDA-UB": "features",
    "IMTL-G-features": "features",
    "GradDrop-features": "features",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_without_weights_says_so(name):
    with pytest.raises(ValueError, match=f"update_every=5 has no meaning for .*{REFUSED[name]}"):
        make_balancer(name, shared=Net().trunk, num_tasks=3, update_every=5)


def test_the_refusal_names_the_part_that_the_user_asked_for():
    with pytest.raises(ValueError, match="no meaning for FAMO with Sum: its weights follow"):
        make_balancer("FAMO", shared=Net().trunk, num_tasks=3, update_every=5)


def test_settings_that_cannot_be():
    shared = Net().trunk
    with pytest.raises(ValueError, match="GradVac.*direction"):
        tensorwise = GradVac(group="tensor")
        Balancer(Identity(), tensorwise, shared=shared, num_tasks=3, update_every=2)
    with pytest.raises(ValueError, match="NashMTL.*itself"):
        nash = NashMTL(update_every=2)
        Balancer(Identity(), nash, shared=shared, num_tasks=3, update_every=2)
    for value in (0, 1.5, "3"):
        with pytest.raises(ValueError, match="update_every"):
            DBMTL(shared=shared, num_tasks=3, update_every=value)
    with pytest.raises(ValueError, match="in_place.*none"):
        DBMTL(shared=shared, num_tasks=3, beta=0, in_place=True)
    with pytest.raises(ValueError, match="features"):
        Balancer(Identity(), CAGrad(), shared=shared, num_tasks=3, level="features", update_every=2)
    assert set(TAKES_IT) | set(REFUSED) | {"Nash-MTL"} >= {"DB-MTL", "ExcessMTL", "GradNorm"}


def test_every_other_method_refuses():
    for name in set(BASES) - set(TAKES_IT) - {"Nash-MTL", "IGBv2"}:
        with pytest.raises(ValueError, match="has no meaning"):
            make_balancer(name, shared=Net().trunk, num_tasks=3, update_every=2)


# averages in place


@pytest.mark.parametrize("aggregator", [MaxNorm, CAGrad, Sum])
def test_in_place_gives_the_same_numbers(aggregator):
    seen = []
    for in_place in (False, True):
        model = Net()
        balancer = Balancer(
            Log(), aggregator(), shared=model.trunk, num_tasks=3, ema=EMA(), in_place=in_place
        )
        steps = []
        run(balancer, model, range(2), steps)
        step(balancer, model, 2, lambda losses, batch: [losses[0] * 1.0, *losses[1:]])
        losses = model.losses(model.features(9))
        balancer.backward([losses[0], None, losses[2]])
        follow(balancer, model, 3)
        run(balancer, model, range(4, 6), steps)
        seen.append([steps, balancer.state_dict(), model.grads()])
    assert same(*seen)


def test_in_place_keeps_the_average_of_a_gradient_that_is_not_finite():
    seen = []
    for in_place in (False, True):
        model = Net()
        balancer = DBMTL(shared=model.trunk, num_tasks=3, in_place=in_place)
        run(balancer, model, range(2))
        step(balancer, model, 7, infinite)
        assert all(g.isnan().all() for g in model.grads()[:4])
        model.zero_grad()
        run(balancer, model, [3])
        seen.append(balancer.state_dict())
    assert same(*seen) and seen[0]["nonfinite"].tolist() == [0, 1, 0]


class Refusing(NormAggregator):
    can_skip_tasks = True

    def forward(self, norms, losses):
        raise RuntimeError("no pass")


@pytest.mark.parametrize("late", [False, True])  # in the last pass, or after all of them
def test_torn_averages_are_never_used(late):
    model = Net()
    balancer = DBMTL(shared=model.trunk, num_tasks=3, in_place=True)
    run(balancer, model, range(2))
    good = copy.deepcopy(balancer.state_dict())
    if late:
        balancer.aggregator = Refusing()
    with pytest.raises(RuntimeError, match="no pass"):
        step(balancer, model, 2, (lambda losses, batch: losses) if late else failing)
    balancer.aggregator = MaxNorm()
    assert model.grads() == [None] * 7 and balancer.step == 2
    for _ in range(2):
        with pytest.raises(RuntimeError, match="reset_averages"):
            step(balancer, model, 2)
    with pytest.raises(RuntimeError, match="load a state"):
        balancer.state_dict()
    balancer.load_state_dict(good)
    step(balancer, model, 2)
    assert balancer.step == 3
    other = Net()
    again = DBMTL(shared=other.trunk, num_tasks=3, in_place=True)
    with pytest.raises(RuntimeError, match="no pass"):
        step(again, other, 0, failing)
    again.reset_averages()
    step(again, other, 0)
    assert again.step == 1


def test_an_error_before_any_average_tears_nothing():
    model = Net()
    balancer = DBMTL(shared=model.trunk, num_tasks=3, in_place=True)
    run(balancer, model, range(2))
    before = copy.deepcopy(balancer.state_dict())
    with pytest.raises(RuntimeError, match="no pass"):
        step(balancer, model, 2, lambda losses, batch: [Failing.apply(losses[0]), *losses[1:]])
    with pytest.raises(FloatingPointError):
        step(balancer, model, 2, lambda losses, batch: [losses[0] * float("nan"), *losses[1:]])
    assert same(balancer.state_dict(), before)


# in a sweep


def test_a_sweep_may_vary_it():
    label = "DB-MTL(update_every=5)"
    method, hyper = parse_method(label)
    check_settings(method, hyper)
    assert method_label(method, hyper) == label
    with pytest.raises(ValueError, match="MoCo has no setting 'update_every'"):
        check_settings("MoCo", {"update_every": 5})
    without = configuration("qm9", "DB-MTL", 0, "smoke")
    with_it = configuration("qm9", "DB-MTL", 0, "smoke", hyper)
    assert without["hyper"] == {} and with_it["hyper"] == {"update_every": 5}
    assert "update_every" not in hyperparameters("DB-MTL")
