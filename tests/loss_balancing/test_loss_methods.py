"""What every loss method promises, whatever it computes."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl.core.balancer import Balancer
from dbmtl.core.transform import slopes
from dbmtl.gradient_balancing.sum import Sum
from dbmtl.loss_balancing.dwa import DWA
from dbmtl.loss_balancing.famo import FAMO
from dbmtl.loss_balancing.gls import GLS
from dbmtl.loss_balancing.igb import IGBv2
from dbmtl.loss_balancing.imtl_l import IMTLL
from dbmtl.loss_balancing.log import Identity, Log
from dbmtl.loss_balancing.rlw import RLW
from dbmtl.loss_balancing.stch import STCH
from dbmtl.loss_balancing.uw import UW

MAKE = {
    "EW": lambda T: Identity(),
    "log": lambda T: Log(),
    "IMTL-L": lambda T: IMTLL(T),
    "GLS": lambda T: GLS(),
    "RLW": lambda T: RLW(T, seed=3),
    "UW": lambda T: UW(T),
    "DWA": lambda T: DWA(T, window=2),
    "FAMO": lambda T: FAMO(T),
    "STCH": lambda T: STCH(T, mu=0.5, warmup=1, window=2),
}
methods = pytest.mark.parametrize("name", MAKE)


@methods
def test_loss_method_forward_changes_nothing(name, draw, run):
    method = MAKE[name](3)
    run(method, draw(3, 5))
    before = copy.deepcopy(method.state_dict())
    first = slopes(method, draw(3)[6])[0]
    second = slopes(method, draw(3)[6])[0]
    assert_close(first, second, rtol=0, atol=0)
    assert repr(before) == repr(method.state_dict())


@methods
def test_loss_method_slopes_are_finite_differences(name, draw, run, central_differences):
    method = MAKE[name](3)
    losses = draw(3)[7]
    run(method, draw(3, 5))

    def value(at):
        if name == "FAMO":  # its factor c is held fixed
            z = method.memory["w"].softmax(0)
            return (z * (at + 1e-8).log()).sum() / (z / (losses + 1e-8)).sum()
        return method(at).sum()

    expected = central_differences(value, losses, losses * 1e-6)
    assert_close(slopes(method, losses)[0], expected, rtol=1e-7, atol=1e-9)


@methods
def test_loss_method_goes_on_after_a_checkpoint_bit_by_bit(name, tmp_path, draw, run):
    batches = draw(3, 9)
    method = MAKE[name](3)
    run(method, batches[:5])
    torch.save(method.state_dict(), tmp_path / "state")
    fresh = MAKE[name](3)
    fresh.load_state_dict(torch.load(tmp_path / "state"))
    assert_close(run(fresh, batches[5:]), run(method, batches[5:]), rtol=0, atol=0)


@methods
def test_loss_method_permutes_with_its_tasks(name, draw, run):
    order = torch.tensor([2, 0, 1])
    batches = draw(3)
    method = MAKE[name](3)
    permuted = MAKE[name](3)
    if name == "RLW":
        permuted.memory["z"] = permuted.memory["z"][order]
        assert_close(slopes(permuted, batches[0][order])[0], slopes(method, batches[0])[0][order])
        return
    assert_close(run(permuted, batches[:, order]), run(method, batches)[:, order])


@methods
def test_loss_method_float32_agrees_with_float64(name, draw, run):
    narrow = run(MAKE[name](3), draw(3).float())
    wide = run(MAKE[name](3).double(), draw(3))
    assert narrow.dtype == torch.float32 and wide.dtype == torch.float64
    assert_close(narrow.double(), wide, rtol=2e-5, atol=1e-6)


@methods
def test_loss_method_one_task(name, draw, run):
    found = run(MAKE[name](1), draw(1))
    assert found.shape == (8, 1) and found.isfinite().all() and (found > 0).all()


@methods
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
def test_loss_method_extreme_losses_stay_finite(name, size, draw):
    method = MAKE[name](3)
    batches = draw(3).float() * torch.tensor([size, 1.0, 1.0])
    for losses in batches[:6]:
        slope = slopes(method, losses)[0]
        assert slope.isfinite().all() and (slope >= 0).all()
        method.advance(losses)
        if method.looks_again:
            method.after_step(losses / 2)


@methods
def test_loss_method_repr_rebuilds_it(name):
    method = MAKE[name](3)
    again = eval(repr(method))
    assert repr(again) == repr(method) and "\n" not in repr(method)


@methods
def test_loss_method_refuses_what_is_not_finite(name):
    method = MAKE[name](3)
    bad = torch.tensor([float("nan"), float("inf"), 1.0])
    assert method.valid(bad).tolist() == [False, False, True]
    assert "finite" in method.domain


@methods
def test_loss_method_in_a_balancer_is_its_slopes(name):
    """Trunk and heads get the gradient of the weighted sum; nothing but the slopes is needed."""
    torch.manual_seed(0)
    trunk = nn.Linear(4, 3)
    heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(3))
    parameters = [*trunk.parameters(), *heads.parameters()]
    x = torch.randn(5, 4)
    method = MAKE[name](3)
    twin = MAKE[name](3)
    balancer = Balancer(method, Sum(), shared=trunk, num_tasks=3)
    for _ in range(5):
        losses = torch.stack([head(trunk(x)).square().mean() + 0.1 for head in heads])
        expected = slopes(twin, losses.detach())[0]
        wanted = torch.autograd.grad((expected * losses).sum(), parameters, retain_graph=True)
        balancer.backward(losses)
        assert_close(balancer.slopes, expected)
        assert_close([p.grad for p in parameters], list(wanted))
        for p in [*parameters, *balancer.parameters()]:
            p.grad = None
        for s in balancer.parameters():  # so that the balancer sees them move, as the twin's do
            s.data.add_(0.01)
        twin.advance(losses.detach())
        for s in twin.parameters():
            s.data.add_(0.01)
        balancer.after_step(losses.detach() * 0.9)
        if name == "FAMO":
            twin.after_step(losses.detach() * 0.9)


@methods
def test_loss_method_hears_of_the_learning_rate(name):
    """Every method can be told; only IGBv2 has a use for it."""
    method = MAKE[name](2)
    before = repr(method.state_dict())
    method.set_learning_rate_ratio(4.0)
    assert repr(method.state_dict()) == before


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "2"])
@pytest.mark.parametrize("make", [IMTLL, RLW, UW, DWA, FAMO, STCH, IGBv2])
def test_loss_methods_name_a_bad_number_of_tasks(make, bad):
    with pytest.raises(ValueError, match=f"num_tasks must be a whole number from 1, got {bad!r}"):
        make(bad)
