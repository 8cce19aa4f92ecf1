"""What the heads are trained on: the transformed, raw or log losses."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl.dbmtl import DBMTL
from dbmtl.registry import make_balancer, method_names, settings_of

TASKS = 3


def network_and_losses(seed=0, scale=(1.0, 100.0, 0.01)):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    trunk = nn.Linear(4, 5)
    heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(TASKS))
    network = nn.ModuleDict({"trunk": trunk, "heads": heads}).double()
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    z = network["trunk"](x).tanh()
    losses = [
        factor * (head(z) - 1).square().mean()
        for head, factor in zip(network["heads"], scale, strict=True)
    ]
    return network, losses


def gradients_of(method, head_losses, skip=None, accumulate=False, **options):
    network, losses = network_and_losses()
    balancer = make_balancer(
        method,
        shared=network["trunk"],
        num_tasks=TASKS,
        head_losses=head_losses,
        **options,
    )
    if skip is not None:
        losses[skip] = None
    if accumulate:
        balancer.accumulate(losses, size=8)
        balancer.backward()
    else:
        balancer.backward(losses)
    trunk = [p.grad for p in network["trunk"].parameters()]
    heads = [[p.grad for p in head.parameters()] for head in network["heads"]]
    return trunk, heads, [None if loss is None else loss.item() for loss in losses]


def plain_gradients():
    "Of each head, by autograd."
    network, losses = network_and_losses()
    return [
        torch.autograd.grad(loss, list(head.parameters()), retain_graph=True)
        for loss, head in zip(losses, network["heads"], strict=True)
    ]


@pytest.mark.parametrize(
    "method", ["EW", "loss-only", "DB-MTL", "CAGrad", "IMTL-L", "GLS", "PCGrad"]
)
@pytest.mark.parametrize("head_losses", ["raw", "log"])
def test_the_trunk_keeps_its_gradient_and_heads_get_theirs(method, head_losses):
    expected, _, _ = gradients_of(method, "transformed")
    trunk, heads, losses = gradients_of(method, head_losses)
    assert_close(trunk, expected)
    for gradients, plain, loss in zip(heads, plain_gradients(), losses, strict=True):
        slope = 1.0 if head_losses == "raw" else 1 / (loss + 1e-8)
        assert_close(gradients, [slope * gradient for gradient in plain])


@pytest.mark.parametrize("options", [{"skip": 1}, {"accumulate": True}, {"grads": "split"}])
def test_the_same_with_a_missing_task_and_in_pieces(options):
    expected, _, _ = gradients_of("DB-MTL", "transformed", **options)
    trunk, heads, _ = gradients_of("DB-MTL", "raw", **options)
    assert_close(trunk, expected)
    for t, plain in enumerate(plain_gradients()):
        if options.get("skip") == t:
            assert heads[t] == [None, None]
        else:
            assert_close(heads[t], list(plain))


def test_a_loss_of_weight_zero_leaves_its_head_alone():
    """Its slope is zero, and what its head would get of it is nothing over nothing."""
    weights = [0.0, *range(1, TASKS)]
    _, heads, _ = gradients_of("LS", "raw", weights=weights)
    for weight, gradients, plain in zip(weights, heads, plain_gradients(), strict=True):
        assert_close(gradients, [bool(weight) * gradient for gradient in plain])


def test_steps_between_measured_ones_use_the_losses_of_their_own():
    network, losses = network_and_losses()
    balancer = DBMTL(
        shared=network["trunk"], num_tasks=TASKS, update_every=3, head_losses="raw", beta=0.0
    )
    balancer.backward(losses)
    network.zero_grad()
    with torch.no_grad():
        network["heads"][0].weight.mul_(0.5)
    z = network["trunk"](torch.ones(2, 4, dtype=torch.float64)).tanh()
    losses = [(head(z) - 1).square().mean() for head in network["heads"]]
    plain = torch.autograd.grad(losses[0], network["heads"][0].weight, retain_graph=True)
    balancer.backward(losses)
    assert_close(network["heads"][0].weight.grad, plain[0])


@pytest.mark.parametrize("method", [name for name in method_names()])
def test_methods_that_cannot_say_so_when_they_are_made(method):
    options = {"shared": nn.Linear(2, 2), "num_tasks": TASKS, "head_losses": "raw"}
    if "head_losses" in settings_of(method):
        make_balancer(method, **options)
    else:
        with pytest.raises(ValueError, match="moves the heads in its own way"):
            make_balancer(method, **options)


def test_an_unknown_word_is_named():
    with pytest.raises(ValueError, match="head_losses.*'rav'"):
        make_balancer("EW", shared=nn.Linear(2, 2), num_tasks=TASKS, head_losses="rav")
