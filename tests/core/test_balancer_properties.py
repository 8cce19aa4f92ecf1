"""Properties of the balancer over random numbers of tasks, shapes and loss scales."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from dbmtl import DBMTL, make_balancer
from dbmtl.core.gramian import norms
from dbmtl.core.task_gradients import task_gradients

quick = settings(max_examples=20, deadline=None, derandomize=True, database=None)
scales = st.floats(-10, 10).map(lambda e: 10.0**e)
tasks = st.lists(
    st.tuples(scales, st.sampled_from(["own", "own", "own", "zero", "copy"])),
    min_size=1,
    max_size=6,
)
shapes = st.lists(
    st.sampled_from([(), (1,), (3,), (2, 2), (1, 3, 2), (0,)]), min_size=1, max_size=4
)


class Problem(nn.Module):
    """Losses of given scales over parameters of given shapes; some with a zero gradient, some
    copies of another."""

    def __init__(self, kinds, shapes, seed=0, dtype=torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        draw = lambda *size: torch.randn(size, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
        self.kinds, self.trunk = (
            kinds,
            nn.ParameterList(nn.Parameter(draw(*s)) for s in [*shapes, (3,)]),
        )
        self.heads = nn.ParameterList(nn.Parameter(draw(4)) for _ in kinds)
        self.mix = [[draw(4, p.numel()) for p in self.trunk] for _ in kinds]

    def losses(self):
        features = [p.tanh() for p in self.trunk]
        out = []
        for t, (scale, kind) in enumerate(self.kinds):
            source = t - 1 if kind == "copy" and t else t
            z = sum(m @ f.reshape(-1) for m, f in zip(self.mix[source], features, strict=True))
            factor = 0.0 if kind == "zero" else 1.0
            out.append(scale * ((factor * z - self.heads[t]).square().mean() + 0.1))
        return out

    def grads(self):
        return [p.grad.clone() for p in self.parameters()]


def balanced(problem, steps=2, **hyper):
    problem = copy.deepcopy(problem)
    balancer = DBMTL(shared=problem.trunk, num_tasks=len(problem.kinds), **hyper)
    for _ in range(steps):
        problem.zero_grad()
        balancer.backward(problem.losses())
    return problem.grads(), balancer


@quick
@given(tasks, shapes, st.integers(0, 99))
def test_dbmtl_gives_the_same_in_every_order_of_the_passes(kinds, shapes, seed):
    problem = Problem(kinds, shapes, seed)
    expected, first = balanced(problem)
    for mode in ("split", "batched"):
        found, balancer = balanced(problem, grads=mode)
        assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert_close(balancer.weights, first.weights, rtol=1e-9, atol=0)


@quick
@given(
    tasks,
    shapes,
    st.integers(0, 99),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(["EW", "DB-MTL"]),
)
def test_gradients_are_finite_at_every_scale(kinds, shapes, seed, dtype, method):
    problem = Problem(kinds, shapes, seed, dtype)
    balancer = make_balancer(method, shared=problem.trunk, num_tasks=len(kinds))
    for _ in range(2):
        balancer.backward(problem.losses())
    assert all(g.isfinite().all() for g in problem.grads())
    assert balancer.weights.isfinite().all() and balancer.slopes.isfinite().all()
    assert balancer.nonfinite.sum() == 0


@quick
@given(tasks, shapes, st.integers(0, 99), st.randoms(use_true_random=False))
def test_dbmtl_permutes_its_weights_with_the_tasks(kinds, shapes, seed, random):
    problem = Problem([(s, "own") for s, _ in kinds], shapes, seed)
    order = list(range(len(kinds)))
    random.shuffle(order)
    moved = copy.deepcopy(problem)
    moved.kinds, moved.mix = [problem.kinds[t] for t in order], [problem.mix[t] for t in order]
    moved.heads = nn.ParameterList(problem.heads[t] for t in order)
    expected, first = balanced(problem)
    found, second = balanced(moved)
    assert_close(second.weights, first.weights[order], rtol=1e-9, atol=0)
    P = len(problem.trunk)
    assert_close(found[:P], expected[:P], rtol=1e-9, atol=1e-12)
    assert_close(found[P:], [expected[P:][t] for t in order], rtol=1e-9, atol=1e-12)


@quick
@given(tasks, shapes, st.integers(0, 99), scales)
def test_dbmtl_without_eps_is_blind_to_the_scale_of_a_loss(kinds, shapes, seed, factor):
    problem = Problem([(1.0, "own"), *((s, "own") for s, _ in kinds)], shapes, seed)
    expected, _ = balanced(problem, eps=0.0)
    problem.kinds[0] = (factor, "own")
    found, _ = balanced(problem, eps=0.0)
    assert_close(
        found, expected, rtol=1e-9, atol=1e-12
    )  # heads included: the log is blind to it, with an average too


@quick
@given(tasks, shapes, st.integers(0, 99), scales)
def test_max_norm_without_eps_is_blind_to_the_scale_of_a_shorter_gradient(
    kinds, shapes, seed, factor
):
    """Without the log, for any task but the one with the longest gradient."""
    problem = Problem([(1.0, "own"), (1e-4 * min(factor, 1.0), "own")], shapes, seed)
    raw = norms(task_gradients(problem.losses(), problem.trunk).shared)
    results = []
    for small in (1.0, 0.5):
        other = copy.deepcopy(problem)
        other.kinds[1] = (small * problem.kinds[1][0] * min(1.0, (raw[0] / raw[1]).item()), "own")
        make_balancer("gradient-only", shared=other.trunk, num_tasks=2, beta=0, eps=0.0).backward(
            other.losses()
        )
        results.append(other.grads()[: len(other.trunk)])
    assert_close(*results, rtol=1e-9, atol=1e-12)


@quick
@given(tasks, shapes, st.integers(0, 99))
def test_every_part_of_the_step_has_the_length_of_the_longest(kinds, shapes, seed):
    problem = Problem([(s, "own") for s, _ in kinds], shapes, seed)
    _, balancer = balanced(problem, steps=3, eps=0.0)
    length = norms([list(row.values()) for row in balancer.ema.rows.values()])
    assert_close(balancer.weights * length, length.max().expand_as(length), rtol=1e-10, atol=0)
    total = torch.cat(
        [g.reshape(-1) for g in balanced(problem, steps=3, eps=0.0)[0][: len(problem.trunk)]]
    )
    assert total.norm() <= len(kinds) * length.max() * (1 + 1e-9)


@pytest.mark.parametrize("n", [2, 5])
def test_copies_of_one_task_are_n_times_that_task(n):
    one = Problem([(3.0, "own")], [(2, 2)])
    alone, _ = balanced(one)
    many = Problem([(3.0, "own")] * n, [(2, 2)])
    many.mix, many.trunk = one.mix * n, copy.deepcopy(one.trunk)
    many.heads = nn.ParameterList(nn.Parameter(one.heads[0].detach().clone()) for _ in range(n))
    found, balancer = balanced(many)
    assert_close(found[: len(one.trunk)], [n * g for g in alone[: len(one.trunk)]])
    assert_close(balancer.weights, torch.ones(n, dtype=torch.float64), rtol=1e-6, atol=0)
