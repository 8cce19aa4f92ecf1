"""Which tasks reach which parameter, from graphs by hand."""

import pytest
import torch
from torch import nn

from dbmtl.core.partition import Partition, forgotten_layers
from dbmtl.core.task_gradients import loss_edges, trace


def parameters(count):
    return [nn.Parameter(torch.ones(2)) for _ in range(count)]


def graph(*losses):
    return trace(loss_edges(losses))


@pytest.mark.parametrize("count, more", [(5, ""), (6, " and 1 more"), (9, " and 4 more")])
def test_five_forgotten_tensors_are_named_and_the_others_counted(count, more):
    layers = parameters(count)
    labels = {layer: f"layer {number}" for number, layer in enumerate(layers)}
    text = forgotten_layers(dict.fromkeys(layers, 0b11), [], labels)
    assert text.startswith(f"{count} trainable tensors outside `shared`")
    assert text.endswith("layer 4 [2]" + more)


def test_what_one_task_reaches_is_not_forgotten():
    trunk, head, layer = parameters(3)
    reached = {trunk: 0b11, head: 0b10, layer: 0b101}
    assert forgotten_layers(reached, [trunk, layer], {}) == ""
    assert forgotten_layers(reached, [trunk], {}).startswith("1 trainable tensors")


def test_graphs_of_some_tasks_add_up():
    """Bits of a graph count its own losses; those of the partition count all tasks."""
    trunk, first, last = parameters(3)
    partition = Partition([trunk], 3, {})
    names = ("a", "b", "c")
    partition.learn(names, graph((trunk * last).sum()), [2])
    assert not partition.is_complete
    partition.learn(names, graph((trunk * first).sum(), trunk.sum()), [0, 1])
    assert partition.is_complete
    assert partition.reached == {trunk: 0b111, first: 0b001, last: 0b100}


def test_one_task_alone_has_nothing_that_it_alone_reaches():
    trunk, head = parameters(2)
    partition = Partition([trunk], 1, {})
    partition.learn(("a",), graph((trunk * head).sum()))
    assert partition.slipped_in() == ""
    assert partition.describe() == [
        "shared: 1 tensors, 2 parameters",
        "shared, but reached by no loss: 0 tensors, 0 parameters",
        "outside shared, reached by a: 1 tensors, 2 parameters",
    ]


def test_heads_inside_shared_are_told_once():
    trunk, inside, outside = parameters(3)
    partition = Partition([trunk, inside], 2, {inside: "inside"})
    partition.learn(("a", "b"), graph((trunk * inside).sum(), (trunk * outside).sum()))
    assert partition.slipped_in().startswith(
        "1 tensors inside `shared` are reached by one loss alone, and lengthen its gradient: "
        "inside [2]"
    )
    assert partition.slipped_in() == ""


def test_two_trunks_without_heads_are_no_whole_network():
    """Every task has a part of its own, and there is nothing in common that would be a trunk."""
    left, right = parameters(2)
    partition = Partition([left, right], 2, {})
    partition.learn(("a", "b"), graph(left.sum(), right.sum()))
    assert partition.slipped_in().startswith("2 tensors inside `shared` are reached by one loss")


def test_a_layer_without_a_gradient_in_the_first_step_is_told_in_a_later_one():
    """Behind a gate that starts at zero, both graphs reach the layer and nothing arrives there."""
    trunk, layer = parameters(2)
    partition = Partition([trunk], 2, {layer: "gated"})
    partition.learn(("a", "b"), graph((trunk * layer).sum(), (trunk * layer).sum()))
    nothing = torch.zeros(2)
    something = torch.ones(2)
    assert partition.confirm([{layer: nothing}, {layer: nothing}]) == ""
    told = partition.confirm([{layer: something}, {layer: something}])
    assert told.startswith("1 trainable tensors outside `shared`") and "gated [2]" in told
    assert partition.confirm([{layer: something}, {layer: something}]) == ""
