"""What a logger gets after a step: right for every method by its name, and read in one transfer."""

import math

import pytest
import torch
from helpers.methods import (
    FEATURES,
    Net,
    base,
    every,
    every_base,
    follow,
    make,
    step,
    unchanged,
)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dbmtl import DBMTL, Balancer, Identity, MaxNorm, Sum
from dbmtl.core.task_gradients import task_gradients

NAMES = ("seg", "depth", "normal")
# where the direction is made without a weight for each task
NO_WEIGHTS = {"GradDrop", "MTAdam", "MoCo", "GradDrop-features"}
TENSORS = {"MetaBalance"}  # a weight for each task in each tensor
NO_NORMS = {  # weights that follow from the losses alone
    "EW", "LS", "GLS", "RLW", "DWA", "UW", "IMTL-L", "IGBv2", "FAMO", "STCH", "UW-SO", "loss-only",
}  # fmt: skip


def by_name(losses, batch):
    return dict(zip(NAMES, losses, strict=True))


def stepped(name, change=unchanged, seeds=range(2), **options):
    """A balancer after some steps, its model, and the raw gradients that the last step saw."""
    model = Net()
    balancer = make(name, model, **options)
    for seed in seeds:
        before = [p.detach().clone() for p in model.parameters()]
        step(balancer, model, seed, change)
        seen = model.grads()
        follow(balancer, model, seed)
    with torch.no_grad():
        for p, old in zip(model.parameters(), before, strict=True):
            p.copy_(old)
    return balancer, model, seen


def raw_gradients(model, balancer, seed):
    """[T, d] of the parameters, at the last of the batches."""
    z = model.features(3 * seed + balancer.aggregator.num_batches - 1)
    rows = task_gradients(model.losses(z), model.trunk).shared
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def has_weights(name):
    return base(name) not in NO_WEIGHTS | TENSORS


@every
def test_effective_weights_give_the_gradient_of_the_trunk(name):
    """The sum of raw gradients, each times its effective weight, is what the trunk got."""
    balancer, model, seen = stepped(name, seeds=range(1))  # no average has a past yet
    if not has_weights(name):
        assert balancer.effective_weights is None
        return
    effective = balancer.effective_weights
    assert effective.shape == (3,)
    of_trunk = torch.cat([g.flatten() for g in seen[: len(model.trunk)]])
    if balancer.ema is None:
        expected = effective.to(torch.float64) @ raw_gradients(model, balancer, 0)
        if balancer.aggregator.max_norm:
            expected = expected / max(expected.norm() / balancer.aggregator.max_norm, 1)
        assert_close(of_trunk, expected, rtol=1e-5, atol=1e-9)


@every
def test_the_log_holds_what_the_balancer_holds(name):
    balancer, _, _ = stepped(name, by_name)
    entries = balancer.log()
    kinds = {"loss", "slope"}
    if has_weights(name):
        kinds |= {"weight", "effective_weight"}
    if base(name) not in NO_NORMS:
        kinds |= {"norm"}
    assert list(entries) == [key for key in entries if key.partition("/")[2] in NAMES]
    assert {key.partition("/")[0] for key in entries} == kinds
    assert all(type(number) is float for number in entries.values())
    for t, task in enumerate(NAMES):
        assert entries[f"loss/{task}"] == balancer.losses[t].item()
        assert entries[f"slope/{task}"] == balancer.slopes[t].item()
        if has_weights(name):
            assert entries[f"weight/{task}"] == balancer.weights[t].item()
            assert entries[f"effective_weight/{task}"] == balancer.effective_weights[task].item()


@every_base
def test_norms_are_those_of_the_gradients_that_were_balanced(name):
    balancer, model, _ = stepped(name, seeds=range(1))
    if base(name) in NO_NORMS:
        assert balancer.norms is None
        return
    if name in FEATURES:
        assert balancer.norms.shape == (3,) and (balancer.norms > 0).all()
        return
    lengths = raw_gradients(model, balancer, 0).norm(dim=1) * balancer.slopes.abs()
    if balancer.ema is not None:
        lengths = lengths * 0.5  # the first step of the average, which starts at zero
    assert_close(balancer.norms, lengths, rtol=1e-9, atol=0)


@every_base
def test_cosines_are_there_when_they_were_asked_for(name):
    model = Net()
    balancer = make(name, model)
    step(balancer, model, 0)
    assert not any(key.startswith("cosine") for key in balancer.log())
    follow(balancer, model, 0)
    balancer.with_cosines = True
    step(balancer, model, 1)
    cosines = {key: value for key, value in balancer.log().items() if key.startswith("cosine")}
    if base(name) in NO_NORMS:
        assert cosines == {}
        return
    assert list(cosines) == ["cosine/0/1", "cosine/0/2", "cosine/1/2"]
    assert all(-1 - 1e-9 <= value <= 1 + 1e-9 for value in cosines.values())
    if name not in FEATURES and balancer.ema is None:
        rows = raw_gradients(model, balancer, 1)
        rows = rows * balancer.slopes.sign()[:, None]
        expected = torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0).item()
        assert math.isclose(cosines["cosine/0/1"], expected, rel_tol=1e-6, abs_tol=1e-9)


@every_base
def test_the_log_changes_no_number(name):
    plain, _, gradients = stepped(name)
    watched = Net()
    balancer = make(name, watched)
    balancer.with_cosines = True
    for seed in range(2):
        step(balancer, watched, seed)
        balancer.log()
        seen = watched.grads()
        follow(balancer, watched, seed)
    for a, b in zip(seen, gradients, strict=True):
        assert torch.equal(a, b)


class Reads(TorchDispatchMode):
    """Counts what the host reads."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        self.number += name in ("_local_scalar_dense", "item")
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", ["DB-MTL", "CAGrad", "UW", "PCGrad", "MetaBalance"])
def test_the_log_is_one_tensor_read_at_once(name, monkeypatch):
    balancer, _, _ = stepped(name, by_name)
    balancer.with_cosines = True
    reads = []
    tolist = torch.Tensor.tolist

    def counted(tensor):
        if tensor.is_floating_point():
            reads.append(tensor.shape)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    with Reads() as scalars:
        entries = balancer.log()
    assert reads == [(len(entries),)] and scalars.number == 0


def test_before_the_first_step_there_is_nothing():
    balancer = DBMTL(shared=Net().trunk, num_tasks=3)
    assert balancer.log() == {} and balancer.effective_weights is None


def test_by_hand():
    a = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    balancer = Balancer(Identity(), MaxNorm(eps=0.0), shared=[a], num_tasks=2)
    balancer.with_cosines = True
    balancer.backward({"x": (a * torch.tensor([3.0, 4.0])).sum(), "y": 2 * a.sum() - 2 * a[0]})
    assert balancer.log() == {
        "loss/x": 7.0,
        "loss/y": 2.0,
        "slope/x": 1.0,
        "slope/y": 1.0,
        "weight/x": 1.0,
        "weight/y": 2.5,
        "effective_weight/x": 1.0,
        "effective_weight/y": 2.5,
        "norm/x": 5.0,
        "norm/y": 2.0,
        "cosine/x/y": 0.8,
    }


def test_micro_batches_are_logged_as_the_joined_batch():
    model = Net()
    balancer = DBMTL(shared=model.trunk, num_tasks=3)
    for seed in range(2):
        balancer.accumulate(by_name(model.losses(model.features(seed)), 0), 8)
    balancer.backward()
    both = [torch.stack(model.losses(model.features(seed))) for seed in range(2)]
    expected = (sum(both) / 2).tolist()
    entries = balancer.log()
    for t, task in enumerate(NAMES):
        assert math.isclose(entries[f"loss/{task}"], expected[t], rel_tol=1e-12)
    assert {"norm/seg", "effective_weight/normal"} <= set(entries)


def test_a_gradient_that_is_not_finite_shows():
    model = Net()
    balancer = Balancer(Identity(), MaxNorm(), shared=model.trunk, num_tasks=3)
    losses = model.losses(model.features())
    losses[1] = losses[1] + (model.trunk[0].sum() * 0).sqrt()
    balancer.backward(losses)
    entries = balancer.log()
    assert math.isnan(entries["norm/1"]) and math.isfinite(entries["norm/0"])


def test_equal_weighting_counts_every_gradient_once():
    model = Net()
    balancer = Balancer(Identity(), Sum(), shared=model.trunk, num_tasks=3)
    balancer.backward(model.losses(model.features()))
    assert balancer.effective_weights.tolist() == [1, 1, 1]


def test_a_log_speaks_of_the_tasks_that_a_step_had():
    """An absent task has no number of its own; those of the others are as without it."""
    torch.manual_seed(0)
    trunk = torch.nn.Linear(4, 8)
    heads = torch.nn.ModuleList(torch.nn.Linear(8, 1) for _ in range(3))
    x = torch.randn(16, 4)
    balancer = DBMTL(shared=trunk, num_tasks=3, beta=0)
    balancer.with_cosines = True
    losses = [head(trunk(x)).square().mean() for head in heads]
    balancer.backward([losses[0], None, losses[2]])
    told = balancer.log()
    names = {key.partition("/")[2] for key in told}
    assert names == {"0", "2", "0/2"} and balancer.norms[1] == 0 and balancer.weights[1] == 0
    two = DBMTL(shared=trunk, num_tasks=2, beta=0)
    two.with_cosines = True
    losses = [head(trunk(x)).square().mean() for head in heads]
    two.backward([losses[0], losses[2]])
    for key, value in two.log().items():
        assert told[key.replace("1", "2")] == pytest.approx(value, rel=1e-6), key
