"""What MoCo, ExcessMTL, SDMGrad and MoDo have in common."""

import copy

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.balancer import Balancer
from dbmtl.core.gramian import gramian
from dbmtl.gradient_balancing.excess_mtl import ExcessMTL
from dbmtl.gradient_balancing.moco import MoCo
from dbmtl.gradient_balancing.modo import MoDo
from dbmtl.gradient_balancing.sdmgrad import SDMGrad
from dbmtl.loss_balancing.log import Identity

PAPERS_MOCO = {"normalize": False, "projection": "simplex", "rho": 0.2, "c": 0.02, "b": 0.9}
CONSTANT = {"b_decay": 0.0, "c_decay": 0.0}
METHODS = {
    "moco": MoCo,
    "moco-paper": lambda: MoCo(**PAPERS_MOCO, **CONSTANT),
    "excess": ExcessMTL,
    "excess-warm": lambda: ExcessMTL(step_size=1.0, warmup=3),
    "sdmgrad": SDMGrad,
    "sdmgrad-slow": lambda: SDMGrad(lr=0.02, eps=0.0),
    "modo": MoDo,
    "modo-fast": lambda: MoDo(gamma=0.05),
}
everything = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


@pytest.fixture(scope="module")
def call(task_rows):
    """One step from two batches' Jacobians, of which the methods with memory read the first."""

    def take_step(method, J, losses, cut=None):
        if method.num_batches == 3:
            return method(J[0] @ J[1].mT, losses)
        positions = None if cut is None else [0, 1]
        answer = method(task_rows(J[0], cut), losses, positions)
        return torch.cat(answer) if isinstance(answer, list) else answer

    return take_step


@everything
@pytest.mark.parametrize("T", [1, 2, 5])
def test_stochastic_methods_permute_with_the_tasks(make, T, jacobians, call):
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    plain = make()
    permuted = make()
    losses = torch.rand(T).double() + 0.5
    for J in jacobians(T):
        expected = call(plain, J, losses)
        assert expected.isfinite().all()
        if not isinstance(plain, MoCo):  # weights, not a direction
            expected = expected[order]
        assert_close(call(permuted, J[:, order], losses[order]), expected, rtol=1e-9, atol=1e-9)


@everything
def test_stochastic_methods_do_not_see_how_parameters_are_cut(make, jacobians, call):
    whole = make()
    cut = make()
    losses = torch.ones(3).double()
    for J in jacobians(3):
        assert_close(call(whole, J, losses), call(cut, J, losses, cut=5), rtol=1e-10, atol=1e-12)


@everything
def test_stochastic_methods_in_float32(make, jacobians, call):
    wide = make()
    narrow = make()
    for J in jacobians(3):
        expected = call(wide, J, torch.ones(3).double())
        answer = call(narrow, J.float(), torch.ones(3))
        assert answer.dtype == torch.float32
        assert_close(answer.double(), expected, rtol=1e-4, atol=1e-4)


@everything
def test_stochastic_methods_go_on_from_a_saved_state(make, jacobians, call):
    method = make()
    loaded = make()
    steps = jacobians(3)
    losses = torch.ones(3).double()
    for J in steps[:3]:
        call(method, J, losses)
    state = copy.deepcopy(method.state_dict())
    call(method, steps[3], losses)
    loaded.load_state_dict(state)
    call(loaded, steps[3], losses)
    answer = call(method, steps[4], losses)
    assert torch.equal(call(loaded, steps[4], losses), answer)
    if not isinstance(method, SDMGrad):  # whose 20 steps may forget where they came from
        assert not torch.equal(call(make(), steps[4], losses), answer)


@everything
@pytest.mark.parametrize("T", [1, 2, 11])
def test_stochastic_methods_survive_zero_equal_and_opposite_gradients(make, T, call):
    row = torch.randn(8, generator=torch.Generator().manual_seed(0)).double()
    signs = torch.where(torch.arange(T) % 2 == 0, 1.0, -1.0).double()[:, None]
    for J in (torch.zeros(T, 8).double(), row.expand(T, 8), signs * row):
        method = make()
        same = torch.stack([J, J])
        opposite = torch.stack([J, -J])
        for batches in (same, same, same, opposite, 0 * same):
            answer = call(method, batches, torch.ones(T).double())
            assert answer.isfinite().all()
            if method.num_batches == 3:
                assert (answer >= 0).all()
                assert_close(answer.sum(), torch.tensor(1.0).double())


@everything
@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_stochastic_methods_survive_extreme_scales(make, scale, jacobians, call):
    for dtype in (torch.float32, torch.float64):
        method = make()
        losses = torch.tensor([1.0, scale, 1.0], dtype=dtype)
        for J in jacobians(3).to(dtype) * scale:
            assert call(method, J, losses).isfinite().all()


def public_attributes(method):
    return {name: value for name, value in vars(method).items() if not name.startswith("_")}


@everything
def test_stochastic_methods_repr(make):
    method = make()
    again = eval(repr(method))
    assert repr(again) == repr(method) and "=" in repr(method)
    assert public_attributes(again) == public_attributes(method)


@pytest.mark.parametrize("cls", [MoCo, ExcessMTL])
def test_memory_of_another_shape_is_refused_before_anything_changes(cls):
    method = cls()
    losses = torch.ones(2)
    method([[torch.ones(2), torch.ones(3)], [torch.ones(2), torch.ones(3)]], losses)
    memory = copy.deepcopy(method.memory)
    with pytest.raises(ValueError, match="position 1"):
        method([[torch.ones(2), torch.ones(4)], [torch.ones(2), torch.ones(4)]], losses)
    assert_close(method.memory, memory, rtol=0, atol=0)


@pytest.mark.parametrize("cls, default", [(SDMGrad, "sum"), (MoDo, "mean")])
def test_three_batch_methods_say_what_heads_get(cls, default):
    assert cls().heads == default and cls.num_batches == 3 and not cls.weights_heads
    assert [cls(heads=h).heads for h in ("sum", "mean", "last")] == ["sum", "mean", "last"]


def trunk_gradients(net, losses):
    trunk = list(net["trunk"].parameters())
    return [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in losses]


@pytest.mark.parametrize("heads", ["sum", "mean", "last"])
@pytest.mark.parametrize("cls", [SDMGrad, MoDo])
def test_three_batches_in_one_backward(cls, heads, network, losses_of):
    net = network()
    first, second, third = (trunk_gradients(net, losses_of(net, seed)) for seed in (1, 2, 3))
    balancer = Balancer(Identity(), cls(heads=heads), shared=net["trunk"], num_tasks=2)
    balancer.backward(*(losses_of(net, seed) for seed in (1, 2, 3)))
    G1 = torch.stack([torch.cat([g.flatten() for g in row]) for row in first])
    G2 = torch.stack([torch.cat([g.flatten() for g in row]) for row in second])
    w = cls()(G1 @ G2.T, torch.ones(2).double())
    assert_close(balancer.weights.double(), w)
    for p, a, b in zip(net["trunk"].parameters(), *third, strict=True):
        assert_close(p.grad, w[0] * a + w[1] * b)
    plain = network()
    seeds = (3,) if heads == "last" else (1, 2, 3)
    divisor = 3 if heads == "mean" else 1
    for seed in seeds:
        (sum(losses_of(plain, seed)) / divisor).backward()
    for name in "ab":
        for p, q in zip(net[name].parameters(), plain[name].parameters(), strict=True):
            assert_close(p.grad, q.grad)


def test_cross_gramian_of_the_library_has_the_first_batch_in_its_rows(jacobians, task_rows):
    G1, G2 = jacobians(3)[0]
    first = task_rows(G1, 5)
    second = task_rows(G2, 5)
    assert_close(gramian(first, second), G1 @ G2.T)
    assert not torch.allclose(gramian(first, second), gramian(second, first))
