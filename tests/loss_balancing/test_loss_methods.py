"""GLS, RLW, UW, DWA, FAMO and STCH: hand-computed numbers, independent routes, properties, edges."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl.core.balancer import Balancer
from dbmtl.core.epoch_means import EpochMeans
from dbmtl.core.transform import slopes
from dbmtl.gradient_balancing.sum import Sum
from dbmtl.loss_balancing.famo import FAMO, STCH
from dbmtl.loss_balancing.imtl_l import IMTLL
from dbmtl.loss_balancing.log import Log
from dbmtl.loss_balancing.uw import DWA, GLS, RLW, UW

F64 = torch.float64
MAKE = {
    "GLS": lambda T: GLS(),
    "RLW": lambda T: RLW(T, seed=3),
    "UW": lambda T: UW(T),
    "DWA": lambda T: DWA(T, window=2),
    "FAMO": lambda T: FAMO(T),
    "STCH": lambda T: STCH(T, mu=0.5, warmup=1, window=2),
}
methods = pytest.mark.parametrize("name", MAKE)


def draw(T, steps=8, seed=0, dtype=F64):
    return torch.rand(steps, T, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 0.05


def step(method, losses, after=None):
    """One step as a balancer does it: slopes, SGD on learned scales, hooks."""
    slope, scales = slopes(method, losses)
    with torch.no_grad():
        for s, g in zip(method.parameters(), scales, strict=True):
            s -= 0.1 * g
    method.advance(losses)
    if method.looks_again:
        method.after_step(losses.pow(1.5) if after is None else after)
    return slope


def run(method, batches):
    return torch.stack([step(method, losses) for losses in batches])


# ------------------------------------------------------------------------------------------------ all six


@methods
def test_loss_method_forward_changes_nothing(name):
    method = MAKE[name](3)
    run(method, draw(3, 5))
    before = copy.deepcopy(method.state_dict())
    first, second = slopes(method, draw(3)[6])[0], slopes(method, draw(3)[6])[0]
    assert_close(first, second, rtol=0, atol=0)
    assert repr(before) == repr(method.state_dict())


@methods
def test_loss_method_slopes_are_finite_differences(name):
    method, losses = MAKE[name](3), draw(3)[7]
    run(method, draw(3, 5))

    def value(at):
        if name == "FAMO":  # its factor c is held fixed
            z = method.memory["w"].softmax(0)
            return (z * (at + 1e-8).log()).sum() / (z / (losses + 1e-8)).sum()
        return method(at).sum()

    h = 1e-6
    with torch.no_grad():
        steps = torch.diag(losses * h)
        expected = torch.stack(
            [(value(losses + e) - value(losses - e)) / (2 * e.sum()) for e in steps]
        )
    assert_close(slopes(method, losses)[0], expected, rtol=1e-7, atol=1e-9)


@methods
def test_loss_method_goes_on_after_a_checkpoint_bit_by_bit(name, tmp_path):
    batches, method = draw(3, 9), MAKE[name](3)
    run(method, batches[:5])
    torch.save(method.state_dict(), tmp_path / "state")
    fresh = MAKE[name](3)
    fresh.load_state_dict(torch.load(tmp_path / "state"))
    assert_close(run(fresh, batches[5:]), run(method, batches[5:]), rtol=0, atol=0)


@methods
def test_loss_method_permutes_with_its_tasks(name):
    order, batches = torch.tensor([2, 0, 1]), draw(3)
    method, permuted = MAKE[name](3), MAKE[name](3)
    if name == "RLW":
        permuted.memory["z"] = permuted.memory["z"][order]
        assert_close(slopes(permuted, batches[0][order])[0], slopes(method, batches[0])[0][order])
        return
    assert_close(run(permuted, batches[:, order]), run(method, batches)[:, order])


@methods
def test_loss_method_float32_agrees_with_float64(name):
    narrow, wide = run(MAKE[name](3), draw(3).float()), run(MAKE[name](3).double(), draw(3))
    assert narrow.dtype == torch.float32 and wide.dtype == F64
    assert_close(narrow.double(), wide, rtol=2e-5, atol=1e-6)


@methods
def test_loss_method_one_task(name):
    found = run(MAKE[name](1), draw(1))
    assert found.shape == (8, 1) and found.isfinite().all() and (found > 0).all()


@methods
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
def test_loss_method_extreme_losses_stay_finite(name, size):
    method, batches = MAKE[name](3), draw(3).float() * torch.tensor([size, 1.0, 1.0])
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
    trunk, heads = nn.Linear(4, 3), nn.ModuleList(nn.Linear(3, 1) for _ in range(3))
    x, method, twin = torch.randn(5, 4), MAKE[name](3), MAKE[name](3)
    balancer = Balancer(method, Sum(), shared=trunk, num_tasks=3)
    for _ in range(5):
        losses = torch.stack([head(trunk(x)).square().mean() + 0.1 for head in heads])
        expected = slopes(twin, losses.detach())[0]
        parameters = [*trunk.parameters(), *heads.parameters()]
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


# ------------------------------------------------------------------------------------------------ GLS


def test_gls_by_hand_and_direction_of_the_log_sum():
    losses = torch.tensor([1.0, 4.0, 16.0], dtype=F64)
    assert_close(GLS()(losses), torch.tensor(4.0, dtype=F64))
    slope = slopes(GLS(), losses)[0]
    assert_close(slope, 4 / (3 * losses))
    assert_close(slope, slopes(Log(eps=0.0), losses)[0] * 4 / 3)


@pytest.mark.parametrize("size", [1e-40, 1e-20, 1e-4, 1e4, 1e30])
def test_gls_does_not_underflow(size):
    """Eleven equal losses: every slope is 1/11, also where the product is 0 or infinite in float32."""
    losses = torch.full((11,), size)
    assert_close(slopes(GLS(), losses)[0], torch.full((11,), 1 / 11))
    assert_close(GLS()(losses), losses[0], rtol=1e-4, atol=0)


def test_gls_float32_losses_lose_nothing():
    losses = (draw(11)[0] * 1e-30).float()
    assert_close(
        slopes(GLS(), losses)[0], slopes(GLS(), losses.double())[0].float(), rtol=2e-7, atol=0
    )


def test_gls_zero_is_outside_the_domain():
    assert GLS().valid(torch.tensor([0.0, 1e-40, -1.0])).tolist() == [False, True, False]


# ------------------------------------------------------------------------------------------------ RLW


def test_rlw_softmax_of_normal_numbers():
    method, logits = RLW(2, seed=0), []
    for _ in range(6000):
        w = slopes(method, torch.ones(2, dtype=F64))[0]
        logits.append((w[0] / w[1]).log())
        assert abs(w.sum() - 1) < 1e-12
        method.advance(torch.ones(2))
    logits = torch.stack(logits)
    assert abs(logits.mean()) < 0.06 and abs(logits.var() - 2) < 0.12
    assert (
        abs((logits.abs() < math.sqrt(2)).double().mean() - 0.6827) < 0.02
    )  # one standard deviation of a normal


def test_rlw_seed_and_total():
    ones = torch.ones(4, dtype=F64)
    assert_close(slopes(RLW(4, seed=5), ones)[0], slopes(RLW(4, seed=5), ones)[0], rtol=0, atol=0)
    assert not torch.equal(slopes(RLW(4, seed=5), ones)[0], slopes(RLW(4, seed=6), ones)[0])
    assert_close(slopes(RLW(4, total="T", seed=5), ones)[0].sum(), torch.tensor(4.0, dtype=F64))
    assert repr(RLW(4, seed=5)) == repr(RLW(4))  # the seed is state, not configuration


def test_rlw_forward_leaves_the_global_stream_alone():
    method = RLW(3)
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    for _ in range(3):
        step(method, torch.ones(3))
    assert_close(torch.rand(2), expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ UW


def test_uw_by_hand():
    method = UW(2)
    slope, [of_s] = slopes(method, torch.tensor([1.0, 4.0]))
    assert_close(slope, torch.full((2,), 0.5 * math.exp(0.5)))
    assert_close(of_s, 0.5 - 0.5 * math.exp(0.5) * torch.tensor([1.0, 4.0]))


def test_uw_is_half_of_imtl_l_with_the_sign_of_s_turned():
    uw, imtl, losses = UW(4), IMTLL(4), draw(4)[0]
    with torch.no_grad():
        uw.s.normal_()
        imtl.s.copy_(-uw.s)
    assert_close(uw(losses), imtl(losses) / 2)
    assert_close(slopes(uw, losses)[0], slopes(imtl, losses)[0] / 2)
    assert_close(slopes(uw, losses)[1][0], -slopes(imtl, losses)[1][0] / 2)


def test_uw_learned_scale_finds_the_loss():
    method, losses = UW(3), torch.tensor([0.2, 1.0, 7.0])
    for _ in range(600):
        step(method, losses)
    assert_close(method.s.exp().detach(), losses, rtol=1e-3, atol=0)
    assert_close(slopes(method, losses)[0], 1 / (2 * losses), rtol=1e-3, atol=0)


def test_uw_half_for_each_task():
    slope = slopes(UW(3, init=0.0, half=(True, False, True)), torch.ones(3))[0]
    assert_close(slope, torch.tensor([0.5, 1.0, 0.5]))
    with pytest.raises(ValueError, match="half must be a bool or 3"):
        UW(3, half=(True, False))
    assert UW(2).valid(torch.tensor([0.0, -1e-9])).tolist() == [True, False]


# ------------------------------------------------------------------------------------------------ DWA


def test_dwa_by_hand():
    method, ones = DWA(3), torch.ones(3, dtype=F64)
    assert_close(slopes(method, ones)[0], ones)
    method.end_epoch(torch.tensor([2.0, 4.0, 1.0]))
    assert_close(slopes(method, ones)[0], ones)
    method.end_epoch(torch.tensor([1.0, 4.0, 3.0]))
    e = [math.exp(0.25), math.exp(0.5), math.exp(1.5)]
    assert_close(slopes(method, ones)[0], 3 * torch.tensor(e, dtype=F64) / sum(e))
    method.end_epoch(torch.tensor([1.0, 4.0, 3.0]))
    assert_close(slopes(method, ones)[0], ones)


def test_dwa_takes_its_own_means_and_ignores_units():
    batches, unit = draw(3, 12), torch.tensor([1.0, 1e3, 1e-3], dtype=F64)
    own, given, scaled = DWA(3), DWA(3), DWA(3)
    for epoch in batches.split(4):
        for losses in epoch:
            for method, factor in ((own, 1), (given, 1), (scaled, unit)):
                method.advance(losses * factor)
        own.end_epoch(None)
        scaled.end_epoch(None)
        given.end_epoch(epoch.mean(0))
    assert_close(own.weights(), given.weights())
    assert_close(own.weights(), scaled.weights())
    assert own.weights().max() > 1.01


@pytest.mark.parametrize(
    ("before", "last", "expected"),
    [
        ([0.0, 1.0], [0.0, 1.0], [1.0, 1.0]),
        ([0.0, 1.0], [1.0, 1.0], [2.0, 0.0]),
        ([0.0, 0.0], [1.0, 3.0], [1.0, 1.0]),
        ([2.0, 1.0], [0.0, 0.0], [1.0, 1.0]),
    ],
)
def test_dwa_zero_losses_are_defined(before, last, expected):
    method = DWA(2)
    method.end_epoch(before)
    method.end_epoch(last)
    assert_close(method.weights(), torch.tensor(expected, dtype=F64))


def test_dwa_window_of_nash_mtl_and_a_forgotten_epoch():
    method = DWA(2, window=25, total=1.0)
    for k in range(50):
        assert_close(method.weights(), torch.full((2,), 0.5, dtype=F64))
        method.advance(torch.tensor([1.0 + (k >= 25), 1.0]))
    e = torch.tensor([2.0, 1.0], dtype=F64).div(2).exp()
    assert_close(method.weights(), e / e.sum())
    method.end_epoch(None)  # a loop that says so anyway does no harm
    assert_close(method.weights(), e / e.sum())
    silent = DWA(2, longest=3)
    for _ in range(4):
        slopes(silent, torch.ones(2))
        silent.advance(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"DWA .*balancer\.end_epoch\(.*window="):
        slopes(silent, torch.ones(2))


def test_dwa_refuses_bad_means():
    with pytest.raises(ValueError, match="means must be finite and not negative"):
        DWA(2).end_epoch([1.0, -1.0])
    with pytest.raises(ValueError, match="expected means of 2 tasks"):
        DWA(2).end_epoch([1.0, 1.0, 1.0])


# ------------------------------------------------------------------------------------------------ FAMO


def test_famo_agrees_with_torch_adam_and_autograd():
    method, w = FAMO(4, w_lr=0.05, gamma=0.01), torch.zeros(4, dtype=F64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=0.05, weight_decay=0.01)
    for k in range(40):
        old, new = draw(4, 2, seed=k)
        z, D = w.detach().softmax(0), old + 1e-8
        assert_close(slopes(method, old)[0], z / D / (z / D).sum())
        method.advance(old)
        method.after_step(new)
        (w.grad,) = torch.autograd.grad(w.softmax(0), w, (D.log() - (new + 1e-8).log()))
        adam.step()
        assert_close(method.memory["w"], w.detach(), rtol=1e-10, atol=1e-13)
    assert w.abs().max() > 0.05


def test_famo_slopes_sum_to_one_and_improved_tasks_lose_weight():
    method, losses = FAMO(3), torch.tensor([1.0, 2.0, 5.0], dtype=F64)
    for _ in range(10):
        slope = step(method, losses, after=losses * torch.tensor([0.5, 0.9, 1.0], dtype=F64))
        assert_close(slope.sum(), torch.tensor(1.0, dtype=F64))
    w = method.memory["w"]
    assert w[0] < w[1] < w[2]


def test_famo_scaling_a_loss_changes_only_the_common_factor():
    unit = torch.tensor([1.0, 1e3, 1e-3], dtype=F64)
    plain, scaled = FAMO(3), FAMO(3)
    for losses in draw(3):
        after = losses.pow(1.5)
        a = step(plain, losses, after) * losses
        b = step(scaled, losses * unit, after * unit) * losses * unit
        assert_close(a / a.sum(), b / b.sum(), rtol=1e-4, atol=0)


def test_famo_missing_second_look_is_an_error():
    method, losses = FAMO(2), torch.ones(2)
    slopes(method, losses)
    slopes(method, losses)  # a refused step leaves nothing pending
    method.advance(losses)
    with pytest.raises(RuntimeError, match=r"balancer\.after_step\(losses\)"):
        slopes(method, losses)
    other = FAMO(2)
    other.load_state_dict(method.state_dict())
    with pytest.raises(RuntimeError, match=r"balancer\.after_step\(losses\)"):
        slopes(other, losses)
    other.after_step(0.9 * losses)
    slopes(other, losses)
    with pytest.raises(RuntimeError, match="after a backward"):
        other.after_step(losses)


def test_famo_second_look_that_is_not_finite_counts_as_unchanged():
    bad, same = FAMO(2), FAMO(2)
    for method, after in ((bad, [float("nan"), 0.5]), (same, [2.0, 0.5])):
        method.advance(torch.tensor([2.0, 1.0]))
        method.after_step(torch.tensor(after))
    assert_close(bad.memory["w"], same.memory["w"], rtol=0, atol=0)
    assert bad.memory["w"][0] > 0 > bad.memory["w"][1]


def test_famo_lower_bounds():
    method = FAMO(2, b=[0.0, 3.0])
    assert method.valid(torch.tensor([0.0, 2.9])).tolist() == [True, False]
    slope = slopes(method, torch.tensor([1.0, 5.0], dtype=F64))[0]
    assert_close(slope, torch.tensor([2 / 3, 1 / 3], dtype=F64), rtol=1e-7, atol=0)
    assert "b = (0.0, 3.0)" in method.domain
    with pytest.raises(ValueError, match="b must be a finite number or 2"):
        FAMO(2, b=(1.0, 2.0, 3.0))


# ------------------------------------------------------------------------------------------------ STCH


def proper(mu, nadir):
    method = STCH(len(nadir), mu=mu, warmup=0)
    method.end_epoch(nadir)
    return method


def test_stch_by_hand():
    slope = slopes(proper(1.0, [1.0, 2.0]), torch.tensor([1.0, 4.0]))[0]
    assert_close(slope, torch.tensor([2 / 3, 1 / 3]))
    assert_close(
        proper(2.0, [1.0, 1.0])(torch.tensor([4.0, 16.0])), torch.tensor(2 * 2 * math.log(2 + 4))
    )


def test_stch_warms_up_for_four_epochs_and_measures_in_the_next():
    method, losses = STCH(2), torch.tensor([0.5, 4.0], dtype=F64)
    for epoch in range(5):
        assert_close(slopes(method, losses)[0], 1 / losses)
        for _ in range(3):
            method.advance(losses * (epoch + 1))
        method.end_epoch(None)
    assert_close(method.memory["nadir"], 5 * losses)
    assert_close(slopes(method, losses)[0], 1 / losses)  # both tasks are a fifth of their nadir
    uneven = losses * torch.tensor([1.0, 3.0], dtype=F64)
    assert_close(slopes(method, uneven)[0], 2 * torch.tensor([0.25, 0.75], dtype=F64) / uneven)
    for _ in range(3):
        method.end_epoch(None)  # no more epochs are needed, and none does harm
    assert_close(method.memory["nadir"], 5 * losses)


def test_stch_window_keeps_the_nadir_of_its_warm_up():
    method = STCH(1, warmup=1, window=2)
    for k in range(12):
        method.advance(torch.tensor([float(k)]))
    assert_close(method.memory["nadir"], torch.tensor([2.5], dtype=F64))


def test_stch_smooth_maximum_and_its_limits():
    losses = draw(5)[0]
    for mu in (0.01, 0.1, 1.0, 10.0):
        value, top = proper(mu, [1.0] * 5)(losses) / 5, losses.log().max()
        assert top - 1e-12 <= value <= top + mu * math.log(5) + 1e-12
    sharp = slopes(proper(1e-3, [1.0] * 5), losses)[0]
    assert_close(sharp, torch.where(losses == losses.max(), 5 / losses, 0.0), atol=1e-6, rtol=1e-6)
    assert_close(slopes(proper(1e6, [1.0] * 5), losses)[0], 1 / losses, rtol=1e-4, atol=0)


def test_stch_scaling_a_loss_and_its_nadir():
    losses, unit = draw(3)[0], torch.tensor([1.0, 1e3, 1e-3], dtype=F64)
    one, other = proper(0.5, [0.5, 1.0, 2.0]), proper(0.5, torch.tensor([0.5, 1.0, 2.0]) * unit)
    assert_close(slopes(other, losses * unit)[0] * unit, slopes(one, losses)[0])


@pytest.mark.parametrize("nadir", [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
@pytest.mark.parametrize("losses", [[0.0, 0.0], [0.0, 1.0], [1e30, 1e-30]])
@pytest.mark.parametrize("mu", [0.01, 1.0, 100.0])
def test_stch_zero_losses_and_zero_nadir_are_defined(nadir, losses, mu):
    method = proper(mu, nadir)
    assert slopes(method, torch.tensor(losses))[0].isfinite().all()
    assert method(torch.tensor(losses)).isfinite()


def test_stch_forgotten_epoch_and_bad_means():
    method = STCH(2, longest=3)
    for _ in range(4):
        method.advance(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"STCH .*balancer\.end_epoch\("):
        slopes(method, torch.ones(2))
    with pytest.raises(ValueError, match="means must be finite and not negative"):
        method.end_epoch([1.0, -1.0])
    done = proper(1.0, [1.0, 1.0])
    for _ in range(5):
        done.advance(torch.ones(2))
    slopes(done, torch.ones(2))


# --------------------------------------------------------------------------------------------- EpochMeans and arguments


def test_epoch_means_by_hand():
    means = EpochMeans(2)
    for losses in ([1.0, 10.0], [3.0, 30.0], [float("nan"), 5.0]):
        means.see(torch.tensor(losses))
    means.finish()
    assert_close(means.last, torch.tensor([2.0, 20.0], dtype=F64))
    assert means.before is None and means.epoch == 1
    means.finish([7.0, 8.0])
    assert_close(means.last, torch.tensor([7.0, 8.0], dtype=F64))
    assert_close(means.before, torch.tensor([2.0, 20.0], dtype=F64))
    with pytest.raises(RuntimeError, match="no step"):
        means.finish()
    with pytest.raises(ValueError, match="finite"):
        means.finish([float("nan"), 1.0])
    assert means.epoch == 2


def test_epoch_means_window_and_limit():
    means = EpochMeans(1, window=3)
    for k in range(7):
        means.see(torch.tensor([float(k)]))
    assert means.epoch == 2 and means.last.item() == 4 and means.before.item() == 1
    means.finish([100.0])
    assert means.epoch == 2
    limited = EpochMeans(1, longest=2)
    for _ in range(2):
        limited.see(torch.ones(1))
    limited.check("X")
    limited.see(torch.ones(1))
    with pytest.raises(RuntimeError, match=r"X .*3 steps.*balancer\.end_epoch\("):
        limited.check("X")
    limited.finish()
    limited.check("X")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RLW(2, total=0.0), "total must be 'T' or a positive number, got 0.0"),
        (lambda: DWA(2, temperature=0.0), "temperature must be positive, got 0.0"),
        (lambda: DWA(2, window=0), "window must be a whole number from 1, got 0"),
        (lambda: DWA(2, total="t"), "total must be 'T'"),
        (lambda: UW(2, init=float("nan")), "init must be finite, got nan"),
        (lambda: FAMO(2, w_lr=-1.0), "w_lr must be finite and not negative, got -1.0"),
        (lambda: FAMO(2, gamma=float("inf")), "gamma must be finite and not negative"),
        (lambda: STCH(2, mu=0.0), "mu must be positive, got 0.0"),
        (lambda: STCH(2, warmup=1.5), "warmup must be a whole number from 0, got 1.5"),
        (lambda: STCH(2, eps=-1.0), "eps must not be negative, got -1.0"),
        (lambda: EpochMeans(0), "num_tasks must be a whole number from 1, got 0"),
    ],
)
def test_loss_method_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "2"])
@pytest.mark.parametrize("make", [RLW, UW, DWA, FAMO, STCH])
def test_loss_methods_name_a_bad_number_of_tasks(make, bad):
    with pytest.raises(ValueError, match=f"num_tasks must be a whole number from 1, got {bad!r}"):
        make(bad)


def test_dwa_long_epochs_are_told_of_longest():
    dwa = DWA(1, longest=2)
    for _ in range(3):
        dwa.advance(torch.ones(1))
    with pytest.raises(
        RuntimeError,
        match=r"balancer\.end_epoch.*window=.*more steps than 2 needs a larger longest=",
    ):
        dwa(torch.ones(1))


def test_famo_notices_losses_that_were_not_computed_anew():
    method = FAMO(2)
    slopes(method, torch.tensor([1.0, 2.0]))
    method.advance(torch.tensor([1.0, 2.0]))
    with pytest.warns(UserWarning, match="the very losses of before"):
        method.after_step(torch.tensor([1.0, 2.0]))
