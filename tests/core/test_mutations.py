"""Cases that once told no difference between the code and a wrong version of it."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl import DBMTL, EMA, Balancer, Identity, make_balancer
from dbmtl.core.grad_scale import add_to_grad
from dbmtl.core.gramian import norms, shorten
from dbmtl.gradient_balancing.max_norm import common_length, equal_norm_weights

F64 = torch.float64


class TwoOutputs(nn.Module):
    """A trunk of two branches; the second task reads one of them alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.below = nn.Linear(3, 4, dtype=F64)
        self.left = nn.Linear(4, 4, dtype=F64)
        self.right = nn.Linear(4, 4, dtype=F64)
        self.heads = nn.ModuleList(nn.Linear(4, 1, dtype=F64) for _ in range(2))
        self.trunk = nn.ModuleList([self.below, self.left, self.right])

    def losses(self):
        z = self.below(torch.linspace(-1, 1, 15, dtype=F64).view(5, 3)).tanh()
        left = self.left(z).tanh()
        right = self.right(z).tanh()
        first = self.heads[0](left * right + right).square().mean() + 0.1
        second = self.heads[1](left).square().mean() + 0.1
        return [first, second]


@pytest.mark.filterwarnings("ignore:.*reached by one loss alone")
@pytest.mark.parametrize("grads", ["split", "batched"])
def test_a_task_that_does_not_enter_a_branch_gets_nothing_from_it(grads):
    gradients = []
    for route in ("loop", grads):
        model = TwoOutputs()
        make_balancer("MGDA", shared=model.trunk, num_tasks=2, grads=route).backward(model.losses())
        gradients.append([p.grad for p in model.parameters()])
    assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:.*reached by one loss alone")
def test_nash_mtl_between_its_updates_with_a_scaler_and_a_longest_direction():
    """The single pass is shortened after unscaling: the same numbers times the scale."""

    def train(scaler):
        model = TwoOutputs().float()
        balancer = make_balancer(
            "Nash-MTL", shared=model.trunk, num_tasks=2, update_every=2, max_norm=0.05
        )
        given = []
        for _ in range(4):
            x = torch.linspace(-1, 1, 15).view(5, 3)
            z = model.below(x).tanh()
            left = model.left(z).tanh()
            right = model.right(z).tanh()
            losses = [
                model.heads[0](left * right + right).square().mean() + 0.1,
                model.heads[1](left).square().mean() + 0.1,
            ]
            balancer.backward(losses, scaler=scaler)
            scale = 1.0 if scaler is None else scaler.get_scale()
            given.append([p.grad / scale for p in model.parameters()])
            for p in model.parameters():
                p.grad = None
        return given

    plain = train(None)
    assert_close(train(torch.amp.GradScaler("cpu", init_scale=2.0**12)), plain)
    for gradients in plain:  # of the trunk; heads are not shortened
        assert_close(norms([gradients[:6]])[0], torch.tensor(0.05), rtol=1e-4, atol=0)


def test_an_average_keeps_its_parameter_through_freezing_and_thawing():
    """The second of three parameters is frozen for a step and has no average then."""
    weights = [nn.Parameter(torch.tensor([float(i + 1)], dtype=F64)) for i in range(3)]
    balancer = Balancer(
        Identity(), make_balancer("EW", shared=weights, num_tasks=2).aggregator, shared=weights,
        num_tasks=2, ema=EMA(0.5, 0.0),
    )  # fmt: skip

    def step(factor):
        total = sum(factor * (i + 1) * w.sum() for i, w in enumerate(weights))
        balancer.backward([total, 10 * total])
        return {i: g.item() for i, g in balancer.ema.rows[0].items()}

    assert step(1.0) == {0: 0.5, 1: 1.0, 2: 1.5}
    weights[1].requires_grad_(False)
    assert step(2.0) == {0: 1.25, 2: 3.75}
    weights[1].requires_grad_(True)
    assert step(4.0)[2] == 7.875 and balancer.ema.rows[0][0].item() == 2.625


class ElsewhereTensor(torch.Tensor):
    """A tensor that says it is on an accelerator."""

    @property
    def device(self):
        return torch.device("cuda")


def test_off_the_cpu_the_old_average_stays_after_a_gradient_that_is_not_finite():
    ema = EMA(0.5, 0.0)
    old = [[torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])]]
    ema.keep(ema.settled(old, [0], norms(old)))
    new = [[torch.tensor([5.0, float("nan")])], [torch.tensor([6.0, 7.0])]]
    lengths = norms(new).as_subclass(ElsewhereTensor)
    settled = ema.settled(new, [0], lengths)
    assert_close(settled[0][0].as_subclass(torch.Tensor), old[0][0])
    assert_close(settled[1][0].as_subclass(torch.Tensor), new[1][0])
    first = EMA().settled(new, [0], lengths)
    assert_close(first[0][0].as_subclass(torch.Tensor), torch.zeros(2))


@pytest.mark.parametrize("factor", [1e-3, 0.5, 1.0, 2.0, 1e6])
def test_a_direction_is_shortened_to_the_limit_and_no_further(factor):
    direction = [torch.tensor([3.0]) * factor, torch.tensor([[0.0, 4.0]]) * factor]
    before = copy.deepcopy(direction)
    shortened = shorten(direction, 5.0)
    assert_close(norms([shortened])[0], torch.tensor(min(5.0, 5.0 * factor)))
    expected = [g * min(1.0, 1 / factor) for g in before]
    assert_close(shortened, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_becomes_a_grad_belongs_to_nobody_else(dtype):
    p = nn.Parameter(torch.zeros(3))
    gradient = torch.ones(3, dtype=dtype)
    add_to_grad([p], [gradient])
    gradient.mul_(7)
    assert_close(p.grad, torch.ones(3))
    p.grad.mul_(5)
    assert_close(gradient, torch.full((3,), 7.0, dtype=dtype))
    fresh = torch.ones(3)
    q = nn.Parameter(torch.zeros(3))
    add_to_grad([q], [fresh], fresh=True)
    assert q.grad is fresh


@pytest.mark.parametrize(
    "alpha, expected",
    [("max", 8.0), ("min", 1.0), ("mean", 4.25), ("median", 4.0), ("1/T", 0.25), (0.3, 0.3)],
)
def test_common_lengths_of_an_even_number_of_tasks(alpha, expected):
    """The median of four is the mean of the middle two; 1/T divides by the tasks, not the sum."""
    lengths = torch.tensor([8.0, 1.0, 6.0, 2.0])
    assert_close(common_length(lengths, alpha), torch.tensor(expected))
    weights = equal_norm_weights(lengths, alpha, eps=0.0)
    assert_close(weights * lengths, torch.full((4,), expected))


def test_median_and_share_in_a_step_of_four_tasks():
    for alpha in ("median", "1/T"):
        theta = nn.Parameter(torch.zeros(4, dtype=F64))
        balancer = DBMTL(shared=[theta], num_tasks=4, beta=0, alpha=alpha, eps=0.0)
        factors = torch.tensor([8.0, 1.0, 6.0, 2.0], dtype=F64)
        balancer.backward([1 + factor * x for factor, x in zip(factors, theta, strict=True)])
        length = {"median": 4.0, "1/T": 0.25}[alpha]
        assert_close(theta.grad, torch.full((4,), length, dtype=F64))
