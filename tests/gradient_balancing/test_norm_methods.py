"""GradNorm, MetaBalance and MTAdam: hand numbers, formulas written a second time, edges."""

import copy
import math

import numpy
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl.core.balancer import Balancer
from dbmtl.gradient_balancing.gradnorm import GradNorm, score_gradient, training_rates
from dbmtl.gradient_balancing.mtadam import (
    MetaBalance,
    MTAdam,
    adam_moments,
    anchor_ratios,
    anchored_weights,
)
from dbmtl.loss_balancing.log import Identity, Log

nan, inf = math.nan, math.inf


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------- GradNorm


def distance(p, norms, target):
    total = sum(map(math.exp, p))
    return sum(
        abs(len(p) * math.exp(a) / total * n - c) for a, n, c in zip(p, norms, target, strict=True)
    )


@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5, 3.0])
def test_gradnorm_scores_follow_central_differences_of_the_distance_to_a_held_target(alpha):
    for seed in range(5):
        p, norms, losses, initial = draw(4, seed=seed), *draw(3, 4, seed=seed + 9).exp()
        ratio = (losses / initial).tolist()
        rates = [x / (sum(ratio) / 4) for x in ratio]
        G = 4 * p.softmax(0) * norms
        target = [G.mean().item() * r**alpha for r in rates]
        expected = []
        for e in numpy.eye(4) * 1e-6:
            up, down = (distance(p.numpy() + side * e, norms.tolist(), target) for side in (1, -1))
            expected.append((up - down) / 2e-6)
        assert_close(training_rates(losses, initial), f64(*rates))
        found = score_gradient(p, norms, training_rates(losses, initial), alpha)
        assert_close(found, f64(*expected), rtol=1e-6, atol=1e-7)


def test_gradnorm_scores_sum_to_nothing_and_permute():
    p, norms, rates = draw(5), draw(5, seed=1).exp(), draw(5, seed=2).exp()
    found, order = score_gradient(p, norms, rates, 1.5), torch.tensor([3, 1, 4, 0, 2])
    assert_close(found.sum(), f64(0.0)[0], atol=1e-12, rtol=0)
    assert_close(score_gradient(p[order], norms[order], rates[order], 1.5), found[order])


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_gradnorm_leaves_a_tie_alone_at_any_scale(scale):
    for T in range(1, 20):
        norms = torch.full((T,), 0.1 * scale, dtype=torch.float64)
        assert score_gradient(torch.zeros(T), norms, torch.ones(T), 1.5).tolist() == [0] * T


def test_gradnorm_rates_do_not_see_units():
    losses, initial = f64(3.0, 0.2, 7.0), f64(6.0, 0.2, 1.0)
    units = f64(1e-12, 1.0, 1e12)
    assert_close(training_rates(losses * units, initial * units), training_rates(losses, initial))
    assert training_rates(f64(1.0), f64(5.0)).tolist() == [1]


def test_gradnorm_rates_at_the_edges():
    assert training_rates(f64(0.0, 0.0), f64(1.0, 2.0)).tolist() == [1, 1]
    assert training_rates(f64(-3.0, 1.0), f64(1.0, 1.0)).tolist() == [0, 2]
    assert training_rates(f64(9.0, 1.0), f64(0.0, 1.0)).tolist() == [1, 1]


def test_gradnorm_first_step_is_the_unit():
    method, norms = GradNorm(2, initial="first"), torch.tensor([5.0, 1.0])
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
    method, norms = GradNorm(2), torch.tensor([5.0, 1.0])
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
    method, norms = GradNorm(2, window=3), torch.ones(2)
    for k in range(5):
        assert ("initial" in method.memory) == (k >= 3)
        method(norms, torch.tensor([1.0 + k, 10.0]))
    assert method.memory["initial"].tolist() == [2, 10]


def test_gradnorm_forgotten_end_epoch_is_named_and_then_heals():
    method, norms = GradNorm(2, longest=3), torch.ones(2)
    for _ in range(4):
        method(norms, torch.ones(2))
    with pytest.raises(RuntimeError, match=r"GradNorm.*balancer\.end_epoch.*window=.*longest="):
        method(norms, torch.ones(2))
    method.end_epoch([1.0, 2.0])
    assert method(norms, torch.ones(2)).tolist() == [1, 1]


def test_gradnorm_refuses_negative_losses_while_it_takes_its_unit():
    for method in (GradNorm(2), GradNorm(2, initial="first")):
        before = copy.deepcopy(method.state_dict())
        with pytest.raises(ValueError, match="not negative, got"):
            method(torch.ones(2), f64(1.0, -0.5))
        assert str(method.state_dict()) == str(before)
    with pytest.raises(ValueError, match="not negative"):
        GradNorm(2).end_epoch(f64(1.0, -1.0))


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
    trunk, heads, x = (
        nn.Linear(3, 4),
        nn.ModuleList(nn.Linear(4, 1) for _ in range(2)),
        torch.randn(16, 3),
    )

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
    trunk, heads = nn.Linear(2, 2), nn.ModuleList(nn.Linear(2, 1) for _ in range(2))
    method = GradNorm(2, weights_heads=weights_heads)
    method.p.data = torch.tensor([0.0, math.log(3)])
    losses = [h(trunk(torch.ones(1, 2))).square().sum() for h in heads]
    Balancer(Identity(), method, shared=trunk, num_tasks=2).backward(losses)
    for t, h in enumerate(heads):
        plain = torch.autograd.grad(h(trunk(torch.ones(1, 2))).square().sum(), h.bias)[0]
        assert_close(h.bias.grad, plain * ((0.5, 1.5)[t] if weights_heads else 1.0))


@pytest.mark.parametrize("keys, named", [
    ({"alpha": -1.0}, "alpha must not be negative, got -1.0"), ({"alpha": nan}, "alpha"),
    ({"initial": "last"}, "'last'"),
    ({"initial": "first", "window": 5}, "window=5"), ({"window": 0}, "window"),
    ({"longest": 0}, "longest .*0"), ({"num_tasks": 0}, "num_tasks .*0"), ({"num_tasks": 2.0}, r"num_tasks .*2\.0"),
])  # fmt: skip
def test_gradnorm_options(keys, named):
    with pytest.raises(ValueError, match=named):
        GradNorm(**{"num_tasks": 2} | keys)


def test_gradnorm_long_epochs():
    method = GradNorm(2, longest=10_001)
    for _ in range(10_002):
        method(torch.ones(2), torch.ones(2))
    with pytest.raises(RuntimeError, match=r"more steps than 10001 needs a larger longest="):
        method(torch.ones(2), torch.ones(2))


# ------------------------------------------------------------------------------------------------------ MetaBalance


@pytest.mark.parametrize("keys", [{}, {"r": 0.3, "beta": 0.5, "target": 2}, {"r": 1.0}, {"r": 0.0}])
def test_metabalance_is_its_formula(keys):
    method, lengths = MetaBalance(**keys), draw(6, 3, 4).abs()
    r, beta, a, n = method.r, method.beta, method.target, numpy.zeros((3, 4))
    for step in lengths:
        n = beta * n + (1 - beta) * step.numpy()
        expected = [[r * n[a][p] / n[t][p] + 1 - r for p in range(4)] for t in range(3)]
        assert_close(method(step, None, [0, 1, 2, 3]), f64(*expected))


def test_metabalance_keeps_norms_by_position():
    whole, parts, lengths = MetaBalance(), MetaBalance(), draw(4, 2, 3).abs()
    for k, step in enumerate(lengths):
        if k % 2:
            found = whole(step[:, [2, 0]], None, [2, 0])
            assert_close(found[:, 1:], parts(step[:, :1], None, [0]))
        else:
            assert_close(whole(step[:, :2], None, [0, 1])[:, :1], parts(step[:, :1], None, [0]))
    assert whole(torch.zeros(2, 0), None, []).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metabalance_zeros_are_finite(dtype):
    method = MetaBalance()
    weights = method(torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]], dtype=dtype), None, [0, 1, 2])
    assert weights.dtype == dtype
    assert_close(weights, torch.tensor([[0.3, 1.0, 0.3], [0.3, 0.3, 0.3]], dtype=dtype))
    assert_close(anchored_weights(f64([1e10], [1e-10])), f64([1.0], [0.7e20 + 0.3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_that_have_faded_away_multiply_a_zero_gradient(dtype):
    """0.9^8000 is below the smallest float64: ratios overflow on the way, 0 x infinity would be NaN."""
    weigh, adam, zero, one = (
        MetaBalance(),
        MTAdam(),
        torch.zeros(1, dtype=dtype),
        torch.ones(1, dtype=dtype),
    )
    for k in range(8000):
        late = one if k == 0 else zero
        weights = weigh(torch.stack([one, late]), None, [0])
        assert weights.isfinite().all()
        if k < 1200 or k % 100 == 0:
            assert move(adam, [[one], [late]], [0])[0].isfinite()
    for length in (1e-320, 1e-300, 1e-60, 1e-40):
        adam.memory["shared"][1][0]["n"] = f64(length)[0]
        assert move(adam, [[one], [zero]], [0])[0].isfinite()


def test_metabalance_permutes_with_its_anchor():
    order, first, second = [2, 0, 1], MetaBalance(target=2), MetaBalance(target=0)
    for step in draw(4, 3, 2).abs():
        assert_close(second(step[order], None, [0, 1]), first(step, None, [0, 1])[order])


def test_metabalance_multiplies_tensors_and_leaves_heads():
    torch.manual_seed(0)
    trunk, heads, x = (
        nn.Linear(3, 4),
        nn.ModuleList(nn.Linear(4, 1) for _ in range(2)),
        torch.randn(8, 3),
    )
    losses = [c * h(trunk(x)).square().mean() for c, h in zip((1, 50), heads, strict=True)]
    inputs = [[*trunk.parameters(), h.bias] for h in heads]
    single = [
        torch.autograd.grad(*pair, retain_graph=True) for pair in zip(losses, inputs, strict=True)
    ]
    Balancer(Identity(), MetaBalance(), shared=trunk, num_tasks=2).backward(losses)
    for p, parameter in enumerate(trunk.parameters()):
        a, b = single[0][p], single[1][p]
        assert_close(parameter.grad, a + b * (0.7 * a.norm() / b.norm() + 0.3))
    assert_close([h.bias.grad for h in heads], [row[2] for row in single])


@pytest.mark.parametrize("keys, named", [
    ({"r": 1.5}, "r must be in .*1.5"), ({"r": nan}, "r must"), ({"beta": 1.0}, "beta"), ({"target": -1}, "target"),
    ({"target": 0.0}, "target"),
])  # fmt: skip
def test_metabalance_options(keys, named):
    with pytest.raises(ValueError, match=named):
        MetaBalance(**keys)


def test_metabalance_target_through_the_balancer():
    theta = nn.Parameter(torch.ones(2))
    balancer = Balancer(Identity(), MetaBalance(target=2), shared=[theta], num_tasks=2)
    with pytest.raises(ValueError, match="target is task 2 of 2"):
        balancer.backward(list(theta))
    assert theta.grad is None and balancer.step == 0 and balancer.aggregator.memory == {}


def test_metabalance_target_is_one_of_the_tasks():
    method = MetaBalance(target=2)
    with pytest.raises(ValueError, match="target is task 2 of 2"):
        method(torch.ones(2, 1), None, [0])
    assert method.memory == {}


# ----------------------------------------------------------------------------------------------------------- MTAdam


def move(method, rows, where):
    """One step without heads."""
    direction = method(rows, None, where)
    assert method.of_heads([]) == {}
    return direction


def mtadam_by_formula(G, betas=(0.9, 0.999, 0.9), eps=1e-8):
    """One tensor, [steps, T, d] gradients, in NumPy, task by task: the directions [steps, d]."""
    G, (b1, b2, b3) = numpy.asarray(G), betas
    T, n = G.shape[1], [0.0] * G.shape[1]
    m, v, found = numpy.zeros(G.shape[1:]), numpy.zeros(G.shape[1:]), []
    for k, step in enumerate(G, 1):
        for t in range(T):
            length = math.sqrt((step[t] ** 2).sum())
            n[t] = length if n[t] == 0 else b3 * n[t] + (1 - b3) * length
        anchor = next((x for x in n if x > 1e-10), None)
        for t in range(T):
            g = step[t] * (1 if anchor is None else anchor / n[t] if n[t] else 0)
            m[t] = b1 * m[t] + (1 - b1) * g
            v[t] = b2 * v[t] + (1 - b2) * g * g
        bottom = numpy.sqrt(v / (1 - b2**k)).max(0) + eps
        found.append(sum(m[t] / (1 - b1**k) / bottom for t in range(T)))
    return torch.tensor(numpy.array(found))


GRADIENTS = {
    "random": draw(8, 3, 5), "scales": draw(8, 3, 5) * f64([1e10], [1.0], [1e-8]),
    "zero task": draw(8, 3, 5) * f64([0], [1], [1]), "zeros": torch.zeros(4, 3, 5).double(),
    "late task": torch.cat([draw(3, 3, 5) * f64([1], [0], [1]), draw(5, 3, 5, seed=1)]),
    "tiny anchor": draw(8, 3, 5) * f64([1e-14], [1.0], [1.0]), "all tiny": draw(8, 3, 5) * 1e-13, "one": draw(8, 1, 5),
    "duplicates": draw(8, 1, 5).expand(8, 4, 5), "opposite": draw(8, 1, 5) * f64([1], [-1]),
}  # fmt: skip


@pytest.mark.parametrize("betas", [(0.9, 0.999, 0.9), (0.0, 0.5, 0.3), (0.5, 0.9, 0.0)])
@pytest.mark.parametrize("name", GRADIENTS)
def test_mtadam_is_its_formula(name, betas):
    G = GRADIENTS[name]
    shared, of_heads, leaf = (
        MTAdam(betas),
        MTAdam(betas),
        torch.zeros(5, dtype=torch.float64, requires_grad=True),
    )
    for step, expected in zip(G, mtadam_by_formula(G, betas), strict=True):
        assert_close(move(shared, [[g] for g in step], [0]), [expected], rtol=1e-9, atol=1e-12)
        assert_close(
            of_heads.of_heads([{leaf: g} for g in step]), {leaf: expected}, rtol=1e-9, atol=1e-12
        )


def test_mtadam_tensors_are_independent_and_known_by_position():
    G = draw(6, 2, 8)
    method, expected = MTAdam(), [mtadam_by_formula(G[:, :, :3]), mtadam_by_formula(G[1:, :, 3:])]
    for k, step in enumerate(G):
        rows = [[g[3:].reshape(1, 5), g[:3]] for g in step]
        if k == 0:
            assert_close(move(method, [row[1:] for row in rows], [4]), [expected[0][0]])
            continue
        two, one = move(method, rows, [7, 4])
        assert_close([one, two.flatten()], [expected[0][k], expected[1][k - 1]])


@pytest.mark.parametrize("zeros", [0, 3])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_mtadam_alone_is_torch_adam(betas, zeros):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    twin, x, y = copy.deepcopy(net), torch.randn(32, 4).double(), torch.randn(32, 1).double()
    balancer = Balancer(Identity(), MTAdam((*betas, 0.9)), shared=net[0], num_tasks=1)
    ours, theirs = (
        torch.optim.SGD(net.parameters(), lr=0.01),
        torch.optim.Adam(twin.parameters(), lr=0.01, betas=betas),
    )
    for k in range(60):
        for model, optimizer in ((net, ours), (twin, theirs)):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean() * (k >= zeros)
            loss.backward() if model is twin else balancer.backward([loss])
            optimizer.step()
    apart = max(
        (p - q).abs().max().item() for p, q in zip(net.parameters(), twin.parameters(), strict=True)
    )
    assert apart < 1e-12


def test_mtadam_does_not_see_the_unit_of_a_loss():
    for scale in (f64(1.0, 1e6, 1e-5), f64(1e4, 1.0, 1.0)):
        one, two = MTAdam(eps=0.0), MTAdam(eps=0.0)
        for step in draw(6, 3, 5):
            expected = move(one, [[g] for g in step], [0])
            found = move(two, [[s * g] for s, g in zip(scale, step, strict=True)], [0])
            assert_close(found, expected, rtol=1e-9, atol=0)


def test_mtadam_heads_that_a_task_does_not_reach_wait():
    method, (a, b) = (
        MTAdam(),
        (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2)),
    )
    G = draw(3, 2, 2)
    expected = mtadam_by_formula(G[[0, 2], :1])
    for k, step in enumerate(G):
        found = method.of_heads([{a: step[0]} if k != 1 else {}, {b: step[1]}])
        assert list(found) == ([b] if k == 1 else [a, b])
        if k != 1:
            assert_close(found[a], expected[k // 2])
    assert method.of_heads([{}, {}]) == {}
    assert {t: list(kept) for t, kept in method.memory["heads"].items()} == {0: [0], 1: [1]}


def test_mtadam_state_goes_on_bit_by_bit_with_new_leaves():
    G, one, leaves = draw(8, 2, 3), MTAdam(), [torch.zeros(3, requires_grad=True) for _ in range(2)]

    def step(method, g, leaves):
        shared = method([[row] for row in g], None, [3])
        return [
            *shared,
            *method.of_heads([{leaf: row} for leaf, row in zip(leaves, g, strict=True)]).values(),
        ]

    for g in G[:4]:
        step(one, g, leaves)
    two, state = MTAdam(), one.state_dict()
    two.load_state_dict(state)
    fresh = [torch.zeros(3, requires_grad=True) for _ in range(2)]
    for g in G[4:]:
        assert_close(step(two, g, fresh), step(one, g, leaves), rtol=0, atol=0)
    three = MTAdam()
    three.load_state_dict(state)
    three.of_heads([{leaf: g} for leaf, g in zip(fresh, G[4], strict=True)])
    with torch.no_grad():
        fresh[0].data = torch.zeros(5)
    with pytest.raises(RuntimeError, match=r"head leaf 0 has shape \[3\], the leaf \[5\]"):
        three.of_heads([{fresh[0]: torch.ones(5)}, {}])


def head_leaves(*shapes):
    return [torch.zeros(shape, requires_grad=True) for shape in shapes]


def test_mtadam_first_step_after_loading_must_reach_the_saved_heads():
    saved, (a, b) = MTAdam(), head_leaves(2, 2)
    for g in draw(5, 3, 2).float():
        saved([[row] for row in g[:2]], None, [0])
        saved.of_heads([{a: g[1]}, {b: g[2]}])
    one, two = torch.ones(2), torch.tensor([-3.0, 0.5])
    c, d, e = head_leaves(4, 2, 2)
    wrong = [[{}, {b: two}], [{a: one}, {}], [{}, {}], [{b: one}, {a: two, b: two}], [{a: one, b: two}, {}],
             [{a: one}, {b: two, d: two}], [{c: torch.ones(4)}, {b: two}], [{}, {d: one, e: two}]]  # fmt: skip
    for heads in wrong:
        resumed = MTAdam()
        resumed.load_state_dict(saved.state_dict())
        before = str(resumed.state_dict())
        resumed([[one], [two]], None, [0])
        with pytest.raises(RuntimeError, match="first step after loading"):
            resumed.of_heads(heads)
        assert (
            str(resumed.state_dict()) == before
            and resumed._leaves == {}
            and resumed._proposed is None
        )
    moved, expected = resumed.of_heads([{a: one}, {b: two}]), saved.of_heads([{a: one}, {b: two}])
    assert_close(moved, expected, rtol=0, atol=0)
    resumed.load_state_dict(saved.state_dict())
    assert resumed._leaves == {}, "a loaded state may have numbered the leaves in another order"


def test_mtadam_resumed_with_one_head_first():
    trunk, heads = nn.Linear(2, 3), nn.ModuleList(nn.Linear(3, 1) for _ in range(2))

    def losses(reached=(True, True)):
        z = trunk(torch.tensor([[0.3, -0.7]]))
        return [
            (h(z) if on else z.sum()).square().sum() for h, on in zip(heads, reached, strict=True)
        ]

    balancer = Balancer(Identity(), MTAdam(), shared=trunk, num_tasks=2)
    for _ in range(5):
        balancer.backward(losses())
    resumed = Balancer(Identity(), MTAdam(), shared=trunk, num_tasks=2)
    resumed.load_state_dict(balancer.state_dict())
    for p in (*trunk.parameters(), *heads.parameters()):
        p.grad = None
    before = str(resumed.state_dict())
    with pytest.raises(RuntimeError, match="all of them"):
        resumed.backward(losses((False, True)))
    assert str(resumed.state_dict()) == before
    assert all(p.grad is None for p in (*trunk.parameters(), *heads.parameters()))
    resumed.backward(losses())
    found = [h.weight.grad for h in heads]
    for h in heads:
        h.weight.grad = None
    balancer.backward(losses())
    assert_close(found, [h.weight.grad for h in heads], rtol=0, atol=0)


@pytest.mark.parametrize("bad", [nan, inf])
def test_mtadam_a_bad_head_stops_the_shared_step_too(bad):
    trunk, heads = nn.Linear(2, 3), nn.ModuleList(nn.Linear(3, 1) for _ in range(2))
    balancer = Balancer(Identity(), MTAdam(), shared=trunk, num_tasks=2)

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return torch.full_like(g, bad)

    def step(poisoned):
        for p in (*trunk.parameters(), *heads.parameters()):
            p.grad = None
        z = trunk(torch.tensor([[0.3, -0.7]]))
        bias = Poison.apply(heads[1].bias) if poisoned else heads[1].bias
        balancer.backward(
            [heads[0](z).square().sum(), (z @ heads[1].weight.T + bias - 1).square().sum()]
        )

    for _ in range(3):
        step(False)
    before = str(balancer.aggregator.state_dict())
    step(True)
    assert str(balancer.aggregator.state_dict()) == before
    assert all(p.grad.isnan().all() for p in (*trunk.parameters(), *heads.parameters()))
    twin = copy.deepcopy(balancer.aggregator.memory)
    step(False)
    assert {adam["k"] for part in ("shared", "heads") for kept in balancer.aggregator.memory[part].values()
            for adam in kept.values()} == {4}  # fmt: skip
    assert twin["shared"][0][0]["k"] == 3


def test_mtadam_a_step_counts_when_the_heads_are_in():
    method, g = MTAdam(), torch.ones(2)
    for _ in range(3):
        method([[g]], None, [0])
    assert method.memory == {"shared": {}, "heads": {}, "shapes": []}
    move(method, [[g]], [0])
    assert method.memory["shared"][0][0]["k"] == 1


@pytest.mark.parametrize("bad", [nan, inf])
def test_mtadam_gradients_that_are_not_finite_leave_no_trace(bad):
    method, leaf = MTAdam(), torch.zeros(2, requires_grad=True)
    method([[torch.ones(2)]], None, [0])
    method.of_heads([{leaf: torch.ones(2)}])
    before, one, off = str(method.state_dict()), torch.ones(2), torch.tensor([1.0, bad])
    for of_trunk, of_head in ((off, off), (off, one), (one, off)):
        direction = method([[of_trunk]], None, [0])[0]
        assert method.of_heads([{leaf: of_head}])[leaf].isnan().all()
        assert direction.isnan().all() and str(method.state_dict()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mtadam_follows_the_dtype_and_keeps_moments_in_float32_at_least(dtype):
    G, method = draw(5, 2, 4), MTAdam()
    for step, expected in zip(G, mtadam_by_formula(G), strict=True):
        [found] = move(method, [[g.to(dtype)] for g in step], [0])
        assert found.dtype == dtype
        rough = 1e-5 if dtype == torch.float32 else 0.05
        assert_close(found.double(), expected, rtol=rough, atol=rough)
    assert method.memory["shared"][0][0]["m"].dtype == torch.float32


def test_mtadam_does_not_change_or_hold_its_gradients():
    G, method = draw(3, 2, 4), MTAdam()
    kept, given = G.clone(), [[[g] for g in step] for step in G]
    first = move(method, given[0], [0])[0]
    copy_of_first = first.clone()
    for rows in given[1:]:
        move(method, rows, [0])
    assert_close([G, first], [kept, copy_of_first], rtol=0, atol=0)


def test_mtadam_has_two_moments_for_each_task_and_none_for_heads_of_others():
    trunk, heads = nn.Linear(2, 3), nn.ModuleList(nn.Linear(3, 1) for _ in range(3))
    balancer = Balancer(Log(), MTAdam(), shared=trunk, num_tasks=3)
    for _ in range(2):
        balancer.backward([h(trunk(torch.ones(4, 2))).square().mean() for h in heads])
    memory = balancer.aggregator.memory
    assert {t: list(kept) for t, kept in memory["shared"].items()} == {t: [0, 1] for t in range(3)}
    assert sum(len(kept) for kept in memory["heads"].values()) == 6
    for part in ("shared", "heads"):
        assert {adam["k"] for kept in memory[part].values() for adam in kept.values()} == {2}


@pytest.mark.parametrize("keys, named", [
    ({"betas": (0.9, 0.999)}, "betas must be three numbers"), ({"betas": (0.9, 1.0, 0.9)}, "betas"),
    ({"betas": (0.9, nan, 0.9)}, "betas"), ({"eps": -1.0}, "eps"), ({"eps": nan}, "eps"),
])  # fmt: skip
def test_mtadam_options(keys, named):
    with pytest.raises(ValueError, match=named):
        MTAdam(**keys)


def test_mtadam_parts_by_hand():
    assert_close(anchor_ratios(f64([0.0, 4.0], [3.0, 2.0])), f64([0.0, 1.0], [1.0, 2.0]))
    m, v = f64(1.0), f64(4.0)
    [mean], [root] = adam_moments([f64(3.0)], [m], [v], [2], (0.5, 0.75))
    assert_close([m, v], [f64(0.5 + 1.5), f64(3 + 9 / 4)])
    assert_close([mean, root], [f64(2 / 0.75), f64(math.sqrt(5.25 / (1 - 0.75**2)))])


# ------------------------------------------------------------------------------------------------------------- all

METHODS = [GradNorm(2), GradNorm(3, alpha=0.5, initial="epoch", window=7, weights_heads=True),
           MetaBalance(r=0.2, beta=0.1, target=1), MTAdam(betas=(0.1, 0.2, 0.3), eps=0.0)]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_repr_evaluates(method):
    assert repr(eval(repr(method))) == repr(method)
