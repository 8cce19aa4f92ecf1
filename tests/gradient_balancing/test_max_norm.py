"""Shares of the gradient by task: how long each is, by name, and what is refused."""

import copy

import pytest
import torch
from helpers.methods import Net, follow, same
from torch.testing import assert_close

from dbmtl import DBMTL, Balancer, Identity, Log, MaxNorm, make_balancer
from dbmtl.core.task_gradients import task_gradients

NAMES = ("seg", "depth", "normal")


def by_name(model, seed=0, order=NAMES):
    losses = dict(zip(NAMES, model.losses(model.features(seed)), strict=True))
    return {name: losses[name] for name in order}


def lengths(model, weights):
    """The length of each task's part of the trunk's gradient, over the common length."""
    balancer = Balancer(
        Identity(), MaxNorm(eps=0.0, weights=weights), shared=model.trunk, num_tasks=3
    )
    rows = task_gradients(list(by_name(model).values()), model.trunk).shared
    norms = torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in rows])
    balancer.backward(by_name(model))
    return balancer.weights * norms / norms.max()


@pytest.mark.parametrize(
    "weights, shares",
    [
        ({"seg": 2, "depth": 1, "normal": 1}, [1.5, 0.75, 0.75]),
        ([2, 1, 1], [1.5, 0.75, 0.75]),
        ((0.2, 0.1, 0.1), [1.5, 0.75, 0.75]),
        (torch.tensor([2.0, 1.0, 1.0]), [1.5, 0.75, 0.75]),
        ({"normal": 0, "depth": 1, "seg": 2}, [2.0, 1.0, 0.0]),
    ],
)
def test_each_gradient_has_its_share_of_the_common_length(weights, shares):
    assert_close(lengths(Net(), weights), torch.tensor(shares).double())


def trained(weights, make=None, seeds=range(4)):
    model = Net()
    options = {} if weights is None else {"weights": weights}
    balancer = (make or DBMTL)(shared=model.trunk, num_tasks=3, **options)
    for seed in seeds:
        balancer.backward(by_name(model, seed))
        follow(balancer, model, seed)
    return model.state_dict()


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.3, 0.3, 0.3], dict.fromkeys(NAMES, 2)])
def test_equal_weights_are_no_weights_to_the_bit(weights):
    assert same(trained(weights), trained(None))


def test_names_are_matched_not_positions():
    by_position = trained([3, 2, 1])
    assert same(trained({"normal": 1, "seg": 3, "depth": 2}), by_position)
    assert not same(trained([1, 2, 3]), by_position)


@pytest.mark.parametrize("name", ["DB-MTL", "gradient-only", "gradient-only+log"])
def test_the_named_methods_take_weights(name):
    def make(**options):
        return make_balancer(name, **options)

    assert not same(trained([3, 2, 1], make), trained(None, make))
    if name != "gradient-only":
        assert same(trained([3, 2, 1], make), trained([3, 2, 1]))


def test_heads_are_not_weighted():
    model = Net()
    DBMTL(shared=model.trunk, num_tasks=3, weights=[5, 1, 0]).backward(by_name(model))
    plain = Net()
    DBMTL(shared=plain.trunk, num_tasks=3).backward(by_name(plain))
    assert same([p.grad for p in model.heads], [p.grad for p in plain.heads])


def test_micro_batches_have_the_same_shares():
    weights = {"seg": 3, "depth": 2, "normal": 1}
    model = Net()
    balancer = Balancer(Log(), MaxNorm(weights=weights), shared=model.trunk, num_tasks=3)
    balancer.accumulate(by_name(model), 8)
    balancer.backward()
    whole = Net()
    other = Balancer(Log(), MaxNorm(weights=weights), shared=whole.trunk, num_tasks=3)
    other.backward(by_name(whole))
    assert_close(model.grads(), whole.grads())


def test_a_state_goes_on_and_belongs_to_its_weights():
    weights = {"seg": 3, "depth": 2, "normal": 1}
    model = Net()
    balancer = DBMTL(shared=model.trunk, num_tasks=3, weights=weights)
    balancer.backward(by_name(model))
    copied = copy.deepcopy(model)
    copied.zero_grad()
    model.zero_grad()
    fresh = DBMTL(shared=copied.trunk, num_tasks=3, weights=weights)
    fresh.load_state_dict(balancer.state_dict())
    balancer.backward(by_name(model, 1))
    fresh.backward(by_name(copied, 1))
    assert same(model.grads(), copied.grads())
    with pytest.raises(ValueError, match="state of another balancer"):
        DBMTL(shared=copied.trunk, num_tasks=3).load_state_dict(balancer.state_dict())


def test_the_representation_tells_weights_only_where_there_are_some():
    assert repr(MaxNorm()) == "MaxNorm(alpha='max', eps=1e-08)"
    assert "weights={'seg': 2.0, 'depth': 1.0}" in repr(MaxNorm(weights={"seg": 2, "depth": 1}))


BAD = [
    ([1, -1, 1], ValueError, r"weights\[1\] must be a finite number at least 0, got -1"),
    ({"seg": float("nan")}, ValueError, r"weights\['seg'\] must be a finite number"),
    ([1, "2", 1], ValueError, r"weights\[1\] must be a finite number at least 0, got '2'"),
    ([0, 0, 0], ValueError, "weights must not all be zero"),
    ({}, ValueError, "weights must not all be zero"),
    ([1, 2], ValueError, "weights of 2 tasks given, there are 3"),
    ({"seg": 1, "depth": 2}, ValueError, "weights of 2 tasks given, there are 3"),
    ("321", TypeError, "weights must be {task: number} or T numbers, got '321'"),
    (2.0, TypeError, "weights must be {task: number} or T numbers, got 2.0"),
]


@pytest.mark.parametrize("weights, kind, message", BAD)
def test_what_is_no_share_is_refused_at_construction(weights, kind, message):
    with pytest.raises(kind, match=message):
        DBMTL(shared=Net().trunk, num_tasks=3, weights=weights)


def test_unknown_names_are_refused_before_anything_is_written():
    model = Net()
    weights = {"seg": 1, "dept": 1, "normal": 1}
    balancer = DBMTL(shared=model.trunk, num_tasks=3, weights=weights)
    with pytest.raises(
        ValueError, match=r"missing: \['depth'\], unknown: \['dept'\]; did you mean"
    ):
        balancer.backward(by_name(model))
    assert balancer.step == 0 and all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match=r"the tasks are \[0, 1, 2\]; missing"):
        balancer.backward(list(by_name(model).values()))
    balancer = DBMTL(shared=model.trunk, num_tasks=3, weights={0: 1, 1: 2, 2: 3})
    balancer.backward(list(by_name(model).values()))
    assert balancer.step == 1


def test_named_weights_without_names_say_what_they_need():
    with pytest.raises(RuntimeError, match="need losses in a dictionary"):
        MaxNorm(weights={"a": 1, "b": 2})(torch.ones(2), torch.ones(2))
