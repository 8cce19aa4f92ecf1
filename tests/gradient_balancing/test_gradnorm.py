"""GradNorm: rates and scores by hand, the gradient by differences, epoch 0, heads, state."""

import copy
import math

import numpy
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl.core.balancer import Balancer
from dbmtl.gradient_balancing.gradnorm import GradNorm, score_gradient, training_rates
from dbmtl.loss_balancing.log import Identity

nan = math.nan
inf = math.inf


def distance(p, norms, target):
    total = sum(map(math.exp, p))
    return sum(
        abs(len(p) * math.exp(a) / total * n - c) for a, n, c in zip(p, norms, target, strict=True)
    )


@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5, 3.0])
def test_gradnorm_scores_follow_central_differences_of_the_distance_to_a_held_target(
    alpha, float64, draw
):
    for seed in range(5):
        p = draw(4, seed=seed)
        norms, losses, initial = draw(3, 4, seed=seed + 9).exp()
        ratio = (losses / initial).tolist()
        rates = [x / (sum(ratio) / 4) for x in ratio]
        G = 4 * p.softmax(0) * norms
        target = [G.mean().item() * r**alpha for r in rates]
        expected = []
        for e in numpy.eye(4) * 1e-6:
            up, down = (distance(p.numpy() + side * e, norms.tolist(), target) for side in (1, -1))
            expected.append((up - down) / 2e-6)
        assert_close(training_rates(losses, initial), float64(*rates))
        gradient = score_gradient(p, norms, training_rates(losses, initial), alpha)
        assert_close(gradient, float64(*expected), rtol=1e-6, atol=1e-7)


def test_gradnorm_scores_sum_to_nothing_and_permute(float64, draw):
    p = draw(5)
    norms = draw(5, seed=1).exp()
    rates = draw(5, seed=2).exp()
    gradient = score_gradient(p, norms, rates, 1.5)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert_close(gradient.sum(), float64(0.0)[0], atol=1e-12, rtol=0)
    assert_close(score_gradient(p[order], norms[order], rates[order], 1.5), gradient[order])


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_gradnorm_leaves_a_tie_alone_at_any_scale(scale):
    for T in range(1, 20):
        norms = torch.full((T,), 0.1 * scale, dtype=torch.float64)
        assert score_gradient(torch.zeros(T), norms, torch.ones(T), 1.5).tolist() == [0] * T


def test_gradnorm_rates_do_not_see_units(float64):
    losses = float64(3.0, 0.2, 7.0)
    initial = float64(6.0, 0.2, 1.0)
    units = float64(1e-12, 1.0, 1e12)
    assert_close(training_rates(losses * units, initial * units), training_rates(losses, initial))
    assert training_rates(float64(1.0), float64(5.0)).tolist() == [1]


def test_gradnorm_rates_at_the_edges(float64):
    assert training_rates(float64(0.0, 0.0), float64(1.0, 2.0)).tolist() == [1, 1]
    assert training_rates(float64(-3.0, 1.0), float64(1.0, 1.0)).tolist() == [0, 2]
    assert training_rates(float64(9.0, 1.0), float64(0.0, 1.0)).tolist() == [1, 1]


def test_gradnorm_first_step_is_the_unit():
    method = GradNorm(2, initial="first")
    norms = torch.tensor([5.0, 1.0])
    [pull] = method.scale_gradients(norms, torch.tensor([4.0, 1.0]))
    assert_close(pull, torch.tensor([3.0, -3.0]))
    assert "initial" not in method.memory, "scale_gradients changes nothing"
    method(norms, torch.tensor([4.0, 1.0]))
    method(norms, torch.tensor([2.0, 1.0]))
    assert method.memory["initial"].tolist() == [4, 1]
    method.end_epoch([9.0, 9.0])
    assert method.memory["initial"].tolist() == [4, 1]


@pytest.mark.parametrize("own", [True, False])
def test_gradnorm_epoch_0_is_equal_weighting_and_gives_the_unit(own):
    method = GradNorm(2)
    norms = torch.tensor([5.0, 1.0])
    for losses in ([4.0, 1.0], [2.0, 3.0]):
        losses = torch.tensor(losses)
        assert method.scale_gradients(norms, losses)[0].tolist() == [0, 0]
        assert method(norms, losses).tolist() == [1, 1]
    method.end_epoch(None if own else [30.0, 20.0])
    assert method.memory["initial"].tolist() == ([3, 2] if own else [30, 20])
    assert method.scale_gradients(norms, losses)[0].tolist() != [0, 0]
    method(norms, losses)
    method.end_epoch([7.0, 7.0])
    assert method.memory["initial"].tolist() == ([3, 2] if own else [30, 20]), "only epoch 0 counts"


def test_gradnorm_window_ends_epoch_0():
    method = GradNorm(2, window=3)
    norms = torch.ones(2)
    for k in range(5):
        assert ("initial" in method.memory) == (k >= 3)
        method(norms, torch.tensor([1.0 + k, 10.0]))
    assert method.memory["initial"].tolist() == [2, 10]


def test_gradnorm_forgotten_end_epoch_is_named_and_then_heals():
    method = GradNorm(2, longest=3)
    norms = torch.ones(2)
    for _ in range(4):
        method(norms, torch.ones(2))
    with pytest.raises(RuntimeError, match=r"GradNorm.*balancer\.end_epoch.*window=.*longest="):
        method(norms, torch.ones(2))
    method.end_epoch([1.0, 2.0])
    assert method(norms, torch.ones(2)).tolist() == [1, 1]


def test_gradnorm_refuses_negative_losses_while_it_takes_its_unit(float64):
    for method in (GradNorm(2), GradNorm(2, initial="first")):
        before = copy.deepcopy(method.state_dict())
        with pytest.raises(ValueError, match="not negative, got"):
            method(torch.ones(2), float64(1.0, -0.5))
        assert str(method.state_dict()) == str(before)
    with pytest.raises(ValueError, match="not negative"):
        GradNorm(2).end_epoch(float64(1.0, -1.0))


@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize("initial", ["epoch", "first"])
def test_gradnorm_norms_that_are_not_finite_leave_no_trace(bad, initial):
    method = GradNorm(2, initial=initial)
    before = str(method.state_dict())
    weights = method(torch.tensor([1.0, bad]), torch.ones(2))
    assert weights[0] == 1 and not weights[1].isfinite()
    assert str(method.state_dict()) == before


def test_gradnorm_balances_a_network_and_its_scores_belong_to_the_optimizer():
    torch.manual_seed(0)
    trunk = nn.Linear(3, 4)
    heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
    x = torch.randn(16, 3)

    def train(method, steps=200, given=True):
        torch.manual_seed(1)
        for module in (trunk, *heads):
            module.reset_parameters()
        balancer = Balancer(Identity(), method, shared=trunk, num_tasks=2)
        optimizer = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=0.002)
        if given:
            optimizer.add_param_group({"params": list(balancer.parameters()), "lr": 0.02})
        for k in range(steps):
            optimizer.zero_grad()
            balancer.backward(
                [c * (h(trunk(x)) - c).square().mean() for c, h in zip((1, 10), heads, strict=True)]
            )
            optimizer.step()
            if k == 4:
                balancer.end_epoch([1.0, 1000.0])
        return balancer

    weights = train(GradNorm(2, alpha=0.0)).weights
    assert weights[0] > 10 * weights[1]
    for method in (GradNorm(2), GradNorm(2, initial="first")):
        with pytest.raises(RuntimeError, match="add_param_group"):
            train(method, given=False)


@pytest.mark.parametrize("weights_heads", [False, True])
def test_gradnorm_heads_are_weighted_only_if_asked(weights_heads):
    trunk = nn.Linear(2, 2)
    heads = nn.ModuleList(nn.Linear(2, 1) for _ in range(2))
    method = GradNorm(2, weights_heads=weights_heads)
    method.p.data = torch.tensor([0.0, math.log(3)])
    losses = [h(trunk(torch.ones(1, 2))).square().sum() for h in heads]
    Balancer(Identity(), method, shared=trunk, num_tasks=2).backward(losses)
    for t, h in enumerate(heads):
        plain = torch.autograd.grad(h(trunk(torch.ones(1, 2))).square().sum(), h.bias)[0]
        assert_close(h.bias.grad, plain * ((0.5, 1.5)[t] if weights_heads else 1.0))


@pytest.mark.parametrize(
    "keys, named",
    [
        ({"alpha": -1.0}, "alpha must be a finite number at least 0, got -1.0"),
        ({"alpha": nan}, "alpha"),
        ({"initial": "last"}, "'last'"),
        ({"initial": "first", "window": 5}, "window=5"),
        ({"window": 0}, "window"),
        ({"longest": 0}, "longest .*0"),
        ({"num_tasks": 0}, "num_tasks .*0"),
        ({"num_tasks": 2.0}, r"num_tasks .*2\.0"),
    ],
)
def test_gradnorm_options(keys, named):
    with pytest.raises(ValueError, match=named):
        GradNorm(**{"num_tasks": 2} | keys)


@pytest.mark.filterwarnings("ignore:GradNorm waits for the end of an epoch")
def test_gradnorm_long_epochs():
    method = GradNorm(2, longest=10_001)
    for _ in range(10_002):
        method(torch.ones(2), torch.ones(2))
    with pytest.raises(RuntimeError, match=r"more steps than 10001 needs a larger longest="):
        method(torch.ones(2), torch.ones(2))


@pytest.mark.parametrize(
    "method",
    [GradNorm(2), GradNorm(3, alpha=0.5, initial="epoch", window=7, weights_heads=True)],
    ids=repr,
)
def test_repr_evaluates(method):
    assert repr(eval(repr(method))) == repr(method)
