"""MTAdam: its formula in NumPy, torch's Adam for one task, heads, state, options."""

import copy
import math

import numpy
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl.core.adam import adam_moments
from dbmtl.core.balancer import Balancer
from dbmtl.gradient_balancing.mtadam import MTAdam, anchor_ratios
from dbmtl.loss_balancing.log import Identity, Log

nan = math.nan
inf = math.inf


def head_leaves(*shapes, dtype=torch.float32):
    """A parameter of its own for each task, which lies in its head."""
    return [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def trunk_and_heads(num_heads):
    trunk = nn.Linear(2, 3)
    return trunk, nn.ModuleList(nn.Linear(3, 1) for _ in range(num_heads))


def move(method, rows, where):
    """One step without heads."""
    direction = method(rows, None, where)
    assert method.of_heads([]) == {}
    return direction


def mtadam_by_formula(G, betas=(0.9, 0.999, 0.9), eps=1e-8):
    """One tensor, [steps, T, d] gradients, in NumPy, task by task: the directions [steps, d]."""
    G = numpy.asarray(G)
    b1, b2, b3 = betas
    T = G.shape[1]
    n = [0.0] * T
    m = numpy.zeros(G.shape[1:])
    v = numpy.zeros(G.shape[1:])
    directions = []
    for k, step in enumerate(G, 1):
        for t in range(T):
            length = math.sqrt((step[t] ** 2).sum())
            n[t] = length if n[t] == 0 else b3 * n[t] + (1 - b3) * length
        anchor = next((x for x in n if x > 1e-10), None)
        for t in range(T):
            g = step[t] * length_ratio(anchor, n[t])
            m[t] = b1 * m[t] + (1 - b1) * g
            v[t] = b2 * v[t] + (1 - b2) * g * g
        bottom = numpy.sqrt(v / (1 - b2**k)).max(0) + eps
        directions.append(sum(m[t] / (1 - b1**k) / bottom for t in range(T)))
    return torch.tensor(numpy.array(directions))


def length_ratio(anchor, length):
    """What a gradient is multiplied by; without an anchor all keep their lengths."""
    if anchor is None:
        return 1
    return anchor / length if length else 0


def factors(*values):
    """One for each task, for gradients [steps, T, d]."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def late_task(draw):
    early = draw(3, 3, 5) * factors(1, 0, 1)
    return torch.cat([early, draw(5, 3, 5, seed=1)])


GRADIENTS = {
    "random": lambda draw: draw(8, 3, 5),
    "scales": lambda draw: draw(8, 3, 5) * factors(1e10, 1.0, 1e-8),
    "zero task": lambda draw: draw(8, 3, 5) * factors(0, 1, 1),
    "zeros": lambda draw: torch.zeros(4, 3, 5).double(),
    "late task": late_task,
    "tiny anchor": lambda draw: draw(8, 3, 5) * factors(1e-14, 1.0, 1.0),
    "all tiny": lambda draw: draw(8, 3, 5) * 1e-13,
    "one": lambda draw: draw(8, 1, 5),
    "duplicates": lambda draw: draw(8, 1, 5).expand(8, 4, 5),
    "opposite": lambda draw: draw(8, 1, 5) * factors(1, -1),
}


@pytest.mark.parametrize("betas", [(0.9, 0.999, 0.9), (0.0, 0.5, 0.3), (0.5, 0.9, 0.0)])
@pytest.mark.parametrize("name", GRADIENTS)
def test_mtadam_is_its_formula(name, betas, draw):
    G = GRADIENTS[name](draw)
    for_trunk = MTAdam(betas)
    for_head = MTAdam(betas)
    [leaf] = head_leaves(5, dtype=torch.float64)
    for step, expected in zip(G, mtadam_by_formula(G, betas), strict=True):
        of_trunk = move(for_trunk, [[g] for g in step], [0])
        assert_close(of_trunk, [expected], rtol=1e-9, atol=1e-12)
        of_head = for_head.of_heads([{leaf: g} for g in step])
        assert_close(of_head, {leaf: expected}, rtol=1e-9, atol=1e-12)


def test_mtadam_tensors_are_independent_and_known_by_position(draw):
    G = draw(6, 2, 8)
    method = MTAdam()
    expected_at_4 = mtadam_by_formula(G[:, :, :3])
    expected_at_7 = mtadam_by_formula(G[1:, :, 3:])  # which is missing in the first step
    for k, step in enumerate(G):
        rows = [[g[3:].reshape(1, 5), g[:3]] for g in step]
        if k == 0:
            assert_close(move(method, [row[1:] for row in rows], [4]), [expected_at_4[0]])
            continue
        at_7, at_4 = move(method, rows, [7, 4])
        assert_close([at_4, at_7.flatten()], [expected_at_4[k], expected_at_7[k - 1]])


@pytest.mark.parametrize("zeros", [0, 3])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_mtadam_alone_is_torch_adam(betas, zeros):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    twin = copy.deepcopy(net)
    x = torch.randn(32, 4).double()
    y = torch.randn(32, 1).double()
    balancer = Balancer(Identity(), MTAdam((*betas, 0.9)), shared=net[0], num_tasks=1)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    adam = torch.optim.Adam(twin.parameters(), lr=0.01, betas=betas)
    for k in range(60):
        for model, optimizer in ((net, sgd), (twin, adam)):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean() * (k >= zeros)
            if model is twin:
                loss.backward()
            else:
                balancer.backward([loss])
            optimizer.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-12


def test_mtadam_does_not_see_the_unit_of_a_loss(float64, draw):
    for scale in (float64(1.0, 1e6, 1e-5), float64(1e4, 1.0, 1.0)):
        plain = MTAdam(eps=0.0)
        rescaled = MTAdam(eps=0.0)
        for step in draw(6, 3, 5):
            expected = move(plain, [[g] for g in step], [0])
            found = move(rescaled, [[s * g] for s, g in zip(scale, step, strict=True)], [0])
            assert_close(found, expected, rtol=1e-9, atol=0)


def test_mtadam_heads_that_a_task_does_not_reach_wait(draw):
    method = MTAdam()
    a, b = head_leaves(2, 2, dtype=torch.float64)
    G = draw(3, 2, 2)
    expected = mtadam_by_formula(G[[0, 2], :1])
    for k, step in enumerate(G):
        found = method.of_heads([{a: step[0]} if k != 1 else {}, {b: step[1]}])
        assert list(found) == ([b] if k == 1 else [a, b])
        if k != 1:
            assert_close(found[a], expected[k // 2])
    assert method.of_heads([{}, {}]) == {}
    assert {t: list(kept) for t, kept in method.memory["heads"].items()} == {0: [0], 1: [1]}


def test_mtadam_state_goes_on_bit_by_bit_with_new_leaves(draw):
    G = draw(8, 2, 3)
    method = MTAdam()
    leaves = head_leaves(3, 3)

    def step(method, g, leaves):
        shared = method([[row] for row in g], None, [3])
        heads = [{leaf: row} for leaf, row in zip(leaves, g, strict=True)]
        return [*shared, *method.of_heads(heads).values()]

    for g in G[:4]:
        step(method, g, leaves)
    state = method.state_dict()
    resumed = MTAdam()
    resumed.load_state_dict(state)
    new_leaves = head_leaves(3, 3)
    for g in G[4:]:
        assert_close(step(resumed, g, new_leaves), step(method, g, leaves), rtol=0, atol=0)
    another = MTAdam()
    another.load_state_dict(state)
    another.of_heads([{leaf: g} for leaf, g in zip(new_leaves, G[4], strict=True)])
    with torch.no_grad():
        new_leaves[0].data = torch.zeros(5)
    with pytest.raises(RuntimeError, match=r"head leaf 0 has shape \[3\], the leaf \[5\]"):
        another.of_heads([{new_leaves[0]: torch.ones(5)}, {}])


def test_mtadam_first_step_after_loading_must_reach_the_saved_heads(draw):
    saved = MTAdam()
    a, b = head_leaves(2, 2)
    for g in draw(5, 3, 2).float():
        saved([[row] for row in g[:2]], None, [0])
        saved.of_heads([{a: g[1]}, {b: g[2]}])
    one = torch.ones(2)
    two = torch.tensor([-3.0, 0.5])
    c, d, e = head_leaves(4, 2, 2)
    wrong = [
        [{}, {b: two}],
        [{a: one}, {}],
        [{}, {}],
        [{b: one}, {a: two, b: two}],
        [{a: one, b: two}, {}],
        [{a: one}, {b: two, d: two}],
        [{c: torch.ones(4)}, {b: two}],
        [{}, {d: one, e: two}],
    ]
    for heads in wrong:
        resumed = MTAdam()
        resumed.load_state_dict(saved.state_dict())
        before = str(resumed.state_dict())
        resumed([[one], [two]], None, [0])
        with pytest.raises(RuntimeError, match="first step after loading"):
            resumed.of_heads(heads)
        assert str(resumed.state_dict()) == before
        assert resumed._leaves == {} and resumed._proposed is None
    right = [{a: one}, {b: two}]
    assert_close(resumed.of_heads(right), saved.of_heads(right), rtol=0, atol=0)
    resumed.load_state_dict(saved.state_dict())
    assert resumed._leaves == {}, "a loaded state may have numbered the leaves in another order"


def test_mtadam_resumed_with_one_head_first():
    trunk, heads = trunk_and_heads(2)

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
    trunk, heads = trunk_and_heads(2)
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
    assert {
        adam["k"]
        for part in ("shared", "heads")
        for kept in balancer.aggregator.memory[part].values()
        for adam in kept.values()
    } == {4}
    assert twin["shared"][0][0]["k"] == 3


def test_mtadam_a_step_counts_when_the_heads_are_in():
    method = MTAdam()
    g = torch.ones(2)
    for _ in range(3):
        method([[g]], None, [0])
    assert method.memory == {"shared": {}, "heads": {}, "shapes": []}
    move(method, [[g]], [0])
    assert method.memory["shared"][0][0]["k"] == 1


@pytest.mark.parametrize("bad", [nan, inf])
def test_mtadam_gradients_that_are_not_finite_leave_no_trace(bad):
    method = MTAdam()
    [leaf] = head_leaves(2)
    good_gradient = torch.ones(2)
    bad_gradient = torch.tensor([1.0, bad])
    method([[good_gradient]], None, [0])
    method.of_heads([{leaf: good_gradient}])
    before = str(method.state_dict())
    for of_trunk, of_head in (
        (bad_gradient, bad_gradient),
        (bad_gradient, good_gradient),
        (good_gradient, bad_gradient),
    ):
        direction = method([[of_trunk]], None, [0])[0]
        assert method.of_heads([{leaf: of_head}])[leaf].isnan().all()
        assert direction.isnan().all() and str(method.state_dict()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mtadam_follows_the_dtype_and_keeps_moments_in_float32_at_least(dtype, draw):
    G = draw(5, 2, 4)
    method = MTAdam()
    for step, expected in zip(G, mtadam_by_formula(G), strict=True):
        [found] = move(method, [[g.to(dtype)] for g in step], [0])
        assert found.dtype == dtype
        rough = 1e-5 if dtype == torch.float32 else 0.05
        assert_close(found.double(), expected, rtol=rough, atol=rough)
    assert method.memory["shared"][0][0]["m"].dtype == torch.float32


def test_mtadam_does_not_change_or_hold_its_gradients(draw):
    G = draw(3, 2, 4)
    copy_of_G = G.clone()
    method = MTAdam()
    steps = [[[g] for g in step] for step in G]
    first = move(method, steps[0], [0])[0]
    copy_of_first = first.clone()
    for rows in steps[1:]:
        move(method, rows, [0])
    assert_close([G, first], [copy_of_G, copy_of_first], rtol=0, atol=0)


def test_mtadam_has_two_moments_for_each_task_and_none_for_heads_of_others():
    trunk, heads = trunk_and_heads(3)
    balancer = Balancer(Log(), MTAdam(), shared=trunk, num_tasks=3)
    for _ in range(2):
        balancer.backward([h(trunk(torch.ones(4, 2))).square().mean() for h in heads])
    memory = balancer.aggregator.memory
    assert {t: list(kept) for t, kept in memory["shared"].items()} == {t: [0, 1] for t in range(3)}
    assert sum(len(kept) for kept in memory["heads"].values()) == 6
    for part in ("shared", "heads"):
        assert {adam["k"] for kept in memory[part].values() for adam in kept.values()} == {2}


@pytest.mark.parametrize(
    "keys, named",
    [
        ({"betas": (0.9, 0.999)}, "betas must be three numbers"),
        ({"betas": (0.9, 1.0, 0.9)}, "betas"),
        ({"betas": (0.9, nan, 0.9)}, "betas"),
        ({"eps": -1.0}, "eps"),
        ({"eps": nan}, "eps"),
    ],
)
def test_mtadam_options(keys, named):
    with pytest.raises(ValueError, match=named):
        MTAdam(**keys)


def test_mtadam_parts_by_hand(float64):
    assert_close(anchor_ratios(float64([0.0, 4.0], [3.0, 2.0])), float64([0.0, 1.0], [1.0, 2.0]))
    m = float64(1.0)
    v = float64(4.0)
    [mean], [root] = adam_moments([float64(3.0)], [m], [v], [2], (0.5, 0.75))
    assert_close([m, v], [float64(0.5 + 1.5), float64(3 + 9 / 4)])
    assert_close([mean, root], [float64(2 / 0.75), float64(math.sqrt(5.25 / (1 - 0.75**2)))])


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mtadam_norms_that_have_faded_away_multiply_a_zero_gradient(dtype, float64):
    """0.9^8000 is below the smallest float64: ratios overflow, 0 x infinity would be NaN."""
    method = MTAdam()
    one = torch.ones(1, dtype=dtype)
    zero = torch.zeros(1, dtype=dtype)
    for k in range(8000):
        late = one if k == 0 else zero
        if k < 1200 or k % 100 == 0:
            assert move(method, [[one], [late]], [0])[0].isfinite()
    for length in (1e-320, 1e-300, 1e-60, 1e-40):
        method.memory["shared"][1][0]["n"] = float64(length)[0]
        assert move(method, [[one], [zero]], [0])[0].isfinite()


@pytest.mark.parametrize("method", [MTAdam(betas=(0.1, 0.2, 0.3), eps=0.0)], ids=repr)
def test_repr_evaluates(method):
    assert repr(eval(repr(method))) == repr(method)
