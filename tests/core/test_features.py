"""Balancing at feature level: what is cut where, and one pass below the cut."""

import pytest
import torch
from helpers.methods import Net, make
from torch import nn
from torch.testing import assert_close

from dbmtl import Balancer, Identity
from dbmtl.core.features import leaves_above, read_features
from dbmtl.core.gramian import norms
from dbmtl.core.task_gradients import loss_edges
from dbmtl.gradient_balancing.nash_mtl import NashMTL


def test_a_way_around_the_features_is_refused():
    model = Net()
    z = model.features()
    first, second, third = model.losses(z)
    second = second + model.trunk[0].square().sum()
    with pytest.raises(ValueError, match="task 1 reaches shared parameters around the features"):
        make("MGDA-UB", model).backward([first, second, third], features=z)


def test_a_way_around_by_another_output_of_the_same_node_is_refused():
    """Both halves leave one operation, and only one of them is what the heads read."""
    model = Net()
    z, other = torch.cat([model.features(), model.features(1)]).chunk(2)
    first, second, third = model.losses(z)
    with pytest.raises(ValueError, match="task 0 reaches shared parameters around the features"):
        make("MGDA-UB", model).backward([first + other.sum(), second, third], features=z)


def test_the_leaves_above_a_cut_are_those_of_the_head():
    model = Net()
    z = model.features()
    edges = loss_edges(model.losses(z))
    cut = torch.autograd.graph.get_gradient_edge(z)
    for edge, head in zip(edges, model.heads, strict=True):
        assert leaves_above(edge, cut) == [head]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda z: [z, z[:1], z], r"equal shapes, got \[8, 3\] and \[1, 3\] \('b'\)"),
        (lambda z: [z, z, z.detach()], "features of task 'c' do not require grad"),
        (lambda z: [z, z], "expected one feature tensor or 3, got 2"),
        (lambda z: {"a": z, "b": z}, r"features of \['a', 'b'\] given"),
    ],
)
def test_features_that_do_not_fit_the_tasks_are_named(change, message):
    z = Net().features()
    with pytest.raises(ValueError, match=message):
        read_features(change(z), 3, ("a", "b", "c"))


def test_features_by_name_come_in_the_order_of_the_tasks():
    a, b = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    assert read_features({"b": b, "a": a}, 2, ("a", "b")) == [a, b]
    assert read_features(a, 2, ("a", "b")) == [a, a]


@pytest.mark.parametrize("max_norm", [0.05, 100.0])
@pytest.mark.parametrize("level", ["parameters", "features"])
def test_one_pass_with_a_scaler_is_shortened_after_unscaling(level, max_norm):
    """The longest norm is that of the gradients themselves, whatever factor the scaler has."""

    def gradients(scaler):
        model = Net(dtype=torch.float32)
        every = {"parameters": 2, "features": 1}[level]
        aggregator = NashMTL(max_norm=max_norm, update_every=every)
        balancer = Balancer(Identity(), aggregator, shared=model.trunk, num_tasks=3, level=level)
        for seed in range(2):  # at the level of parameters the second step is one pass
            model.zero_grad()
            z = model.features(seed)
            features = {"features": z} if level == "features" else {}
            balancer.backward(model.losses(z), scaler=scaler, **features)
        scale = 1.0 if scaler is None else scaler.get_scale()
        return [p.grad / scale for p in model.trunk]

    plain = gradients(None)
    if max_norm == 0.05:
        assert_close(norms([plain])[0], torch.tensor(0.05), rtol=1e-4, atol=0)
    else:
        assert norms([plain])[0] < 10  # nothing is shortened
    assert_close(gradients(torch.amp.GradScaler("cpu", init_scale=2.0**12)), plain)
