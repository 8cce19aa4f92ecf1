"""Convergence: points of rest, distances and bounds by other routes than the module's."""

import math
from functools import partial

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch.testing import assert_close

from dbmtl.report import convergence_checks
from dbmtl.report.convergence import (
    CORNER,
    METHODS,
    TRIANGLE,
    alignment,
    balancer_of,
    boole_medians,
    descend,
    distance_floor,
    distance_to_segment,
    distances_figure,
    exponent,
    handles,
    larger_of_two,
    level_of,
    levels_figure,
    pareto_gap,
    problems,
    pull_of_others,
    quadratics,
    resting_point,
    run_rows,
)

SEEDS = st.integers(0, 2**31 - 1)
ORIGIN = torch.zeros(3, 2, dtype=torch.float64)


def array(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def hessians_of(generator, low, high, count=3):
    """Symmetric matrices with these two eigenvalues, in random directions."""
    made = []
    for angle in torch.rand(count, generator=generator).double() * math.pi:
        axis = torch.stack([angle.cos(), angle.sin()])
        made.append(low * torch.eye(2).double() + (high - low) * torch.outer(axis, axis))
    return torch.stack(made)


# ---------------------------------------------------------------------------- the radius of a stall


@pytest.mark.parametrize("rate", [0.1, 0.01, 0.0004])
@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_stall_radius_by_hand(rate, num_tasks):
    """T losses x^2/2: each log-gradient is 2/x, so sqrt(T rate) is the point that goes to its
    mirror image; nearer ones are thrown out, farther ones come in, sqrt(2 T rate) hits zero."""

    def after(x):
        start = [x]
        balancer = balancer_of("DB-MTL", num_tasks, beta=0, eps=0)
        return float(descend(squares, start, balancer, rate, 1).points[1])

    def squares(theta):
        return 0.5 * theta.square().expand(num_tasks)

    radius = math.sqrt(num_tasks * rate)
    assert math.isclose(radius, distance_floor(rate, num_tasks))
    assert math.isclose(after(radius), -radius)
    assert after(0.99 * radius) < -radius < after(1.01 * radius) < 0
    assert math.isclose(after(radius / 10), radius / 10 - 20 * radius)
    assert abs(after(math.sqrt(2) * radius)) < 1e-12


def test_chatter_by_hand():
    """Three tasks on a line: at the minimum of the middle one the others cancel, and each step is
    as long as the longest gradient times the rate."""
    minima = array([-2.0], [0.0], [1.0])

    def losses(x):
        return 0.5 * (x - minima).square().sum(1)

    path = descend(losses, [0.05], balancer_of("gradient-only", 3, beta=0, eps=0), 0.1, 2)
    first = 0.05 - 0.1 * 2.05
    second = first + 0.1 * (2 + first)
    assert_close(path.points[:, 0], array(0.05, first, second))
    assert distance_floor(0.1, 1 - pull_of_others(minima, minima[1]), 2.0) == 0.1


@settings(max_examples=6, deadline=None)
@given(SEEDS, st.sampled_from([0.0, 0.5]), st.sampled_from([1e-3, 1e-2, 1e-1]))
def test_no_two_steps_near_a_common_minimum_where_a_loss_vanishes(seed, decay, rate):
    generator = torch.Generator().manual_seed(seed)
    hessians = hessians_of(generator, 1.0, 6.0)
    offsets = array(0.0, *torch.rand(2, generator=generator).tolist())
    start = torch.randn(2, generator=generator, dtype=torch.float64)
    losses = partial(quadratics, minima=ORIGIN, hessians=hessians, offsets=offsets)
    path = descend(losses, start, balancer_of("DB-MTL", 3, beta=0, eps=0), rate, 60, decay)
    pull = 3 * 2 * math.sqrt(6) / 7
    rates = rate / torch.arange(1, 61).double() ** decay
    larger = larger_of_two(path.points.norm(dim=1))
    assert (larger >= (1 - 1e-9) * (pull * rates).sqrt()).all()


@settings(max_examples=6, deadline=None)
@given(SEEDS)
def test_without_the_logarithm_the_distance_falls_in_every_step(seed):
    generator = torch.Generator().manual_seed(seed)
    hessians = hessians_of(generator, 1.0, 4.0)
    start = torch.randn(2, generator=generator, dtype=torch.float64)
    losses = partial(quadratics, minima=ORIGIN, hessians=hessians, offsets=array(0, 0, 0))
    rate = 0.99 * 2 * alignment(1.0, 4.0) / (3 * 4)
    path = descend(losses, start, balancer_of("gradient-only", 3, beta=0, eps=0), rate, 40)
    assert (path.points.norm(dim=1).diff() < 0).all()


# ----------------------------------------------------------------------------- points and distances


@settings(max_examples=15, deadline=None)
@example(73020166)  # the unit vectors of two tasks almost balance that of the third
@given(SEEDS)
def test_rest_of_the_balance_minimizes_the_sum_of_distances(seed):
    minima = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)).double()
    rest = resting_point(minima, array(1, 1, 1), array(1, 1, 1), "balance").numpy()

    def total(x):
        return np.linalg.norm(x - minima.numpy(), axis=1).sum()

    options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}
    best = minimize(total, minima.mean(0).numpy(), method="Nelder-Mead", options=options)
    assert total(rest) <= best.fun + 1e-7


def test_rest_of_the_logarithm_is_where_the_sum_of_logarithms_is_flat():
    curvatures = array(1.0, 2.0, 4.0)
    for minima in (TRIANGLE, CORNER):
        point = resting_point(minima, curvatures, curvatures, "log").requires_grad_()
        shift = (point - minima).square().sum(1)
        (curvatures + curvatures * shift / 2).log().sum().backward()
        assert point.grad.norm() < 1e-10


def test_corner_has_the_balance_at_the_middle_minimum_and_triangle_between_all():
    assert_close(resting_point(CORNER, array(1, 1, 1), array(1, 1, 1), "balance"), CORNER[1])
    assert all(pull_of_others(TRIANGLE, minimum) > 1 for minimum in TRIANGLE)


def test_distance_to_a_segment_is_the_smallest_of_many():
    ends = array([0.2, -1.0], [1.5, 0.5])
    points = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)).double()
    shares = torch.linspace(0, 1, 20001).double()[:, None]
    on_it = ends[0] + shares * (ends[1] - ends[0])
    expected = torch.cdist(points, on_it).min(1).values
    assert_close(distance_to_segment(points, "", ends), expected, rtol=0, atol=1e-4)


def test_gap_is_below_the_length_of_the_direction_over_the_number_of_tasks():
    losses = problems()["noisy"].losses
    generator = torch.Generator().manual_seed(1)
    for point in torch.randn(10, 5, generator=generator, dtype=torch.float64):
        path = descend(losses, point, balancer_of("gradient-only", 3, beta=0), 0.1, 1)
        assert pareto_gap(point[None], "", losses) <= path.lengths[0] / 3 + 1e-12


def test_data_of_the_logistic_problems():
    """One plane has all inputs of `separable` on its right side, none those of `noisy`."""
    solvable = problems()["separable"].losses.keywords["margins"]
    noisy = problems()["noisy"].losses.keywords["margins"]
    assert solvable.shape == noisy.shape == (3, 40, 5)
    path = descend(
        problems()["separable"].losses, array(0, 0, 0, 0, 0), balancer_of("DB-MTL", 3), 0.3, 200
    )
    assert (solvable @ path.points[-1]).min() > 0
    for task in noisy:
        assert ((task @ path.points[-1]) < 0).any()


# ----------------------------------------------------------------------------------------- the runs


@pytest.mark.parametrize("schedule", ["constant", "1/√k"])
@pytest.mark.parametrize("label", list(METHODS))
def test_a_run_without_the_library(label, schedule):
    """Algorithm 1 and its halves on the problem `corner`, in numpy."""
    weights = np.array([1.0, 2.0, 4.0])
    x = np.array(problems()["corner"].start)
    beta = {"DB-MTL, β = 0.5/√k": 0.5, "DB-MTL, β = 0.9": 0.9}.get(label, 0)
    average = np.zeros((3, 2))
    lengths = []
    for k in range(1, 31):
        shift = x - CORNER.numpy()
        gradients = weights[:, None] * shift
        if label.startswith(("loss", "DB")):
            losses = weights + weights * (shift**2).sum(1) / 2
            gradients = gradients / (losses + 1e-8)[:, None]
        fading = beta / math.sqrt(k) if beta == 0.5 else beta
        average = fading * average + (1 - fading) * gradients
        direction = average.sum(0)
        if label.startswith(("gradient", "DB")):
            norms = np.linalg.norm(average, axis=1)
            direction = norms.max() * (average / (norms + 1e-8)[:, None]).sum(0)
        lengths.append(np.linalg.norm(direction))
        x = x - 0.02 / (math.sqrt(k) if schedule == "1/√k" else 1) * direction
    curve, level = run_rows("corner", label, schedule, 0.02, 30, points=5)
    assert curve[-1]["step"] == 30 and level["steps"] == 30
    assert math.isclose(curve[-1]["direction"], lengths[-1], rel_tol=6e-3)
    path = descend(
        problems()["corner"].losses,
        problems()["corner"].start,
        balancer_of(METHODS[label].name, 3, **METHODS[label].settings),
        0.02,
        30,
        0.5 if schedule == "1/√k" else 0.0,
    )
    assert_close(path.points[-1], torch.from_numpy(x), rtol=1e-10, atol=1e-12)


def test_levels_of_a_run():
    distances = array(*range(8, 0, -1), 5.0)
    assert larger_of_two(distances).tolist() == [8, 7, 6, 5, 4, 3, 2, 5]
    assert level_of(distances) == (2.0, 3.5, 5.0)


def test_exponent_of_a_power():
    rates = np.geomspace(1e-4, 1e-1, 7)
    assert math.isclose(exponent(rates, 3 * rates**0.37), 0.37)


def test_boole_by_hand():
    assert boole_medians(np.array([2.0]), (1, 2)) == [1.5, 1.5 - 1 / 1.5]


# ------------------------------------------------------------------------------------- the pictures


@pytest.fixture
def levels():
    rows = [
        run_rows(problem, label, "constant", rate, 40)
        for problem in ("zero", "corner")
        for label in ("gradient only", "DB-MTL, β = 0")
        for rate in (0.1, 0.01)
    ]
    yield [row for curve, _ in rows for row in curve], [level for _, level in rows]
    plt.close("all")


def test_figures_draw_the_numbers(levels):
    curves = pd.DataFrame(levels[0]).query("rate == 0.01")
    fig = distances_figure(curves)
    corner = curves[(curves["problem"] == "corner") & (curves["method"] == "gradient only")]
    (line, *_) = [ax for ax in fig.axes if ax.get_title().startswith("minima apart")][0].lines
    np.testing.assert_allclose(line.get_ydata().astype(float), corner["distance"])
    assert [entry.get_label() for entry in handles(curves)] == ["gradient only", "DB-MTL, β = 0"]

    frame = pd.DataFrame(levels[1])
    floors = {name: {"floor": lambda rate: rate} for name in ("zero", "corner")}
    growth = pd.DataFrame({"step": [1, 4], "median": [2.0, 4.0]})
    fig = levels_figure(frame, floors, growth)
    bound = fig.axes[0].lines[-1]
    assert bound.get_xdata().tolist() == bound.get_ydata().tolist() == [0.01, 0.1]
    assert fig.axes[2].lines[1].get_ydata().tolist() == [2.0, 4.0]
    sizes = {text.get_fontsize() for ax in fig.axes for text in ax.get_xticklabels()}
    assert min(sizes) >= 8


# ------------------------------------------------------------------------------------- the checks


@pytest.mark.full
@pytest.mark.parametrize(
    "name, wrong, check",
    [
        ("alignment", lambda *eigenvalues: 1.5, "vanishing_check"),
        ("alignment", lambda *eigenvalues: 1.5, "contraction_check"),
        ("corner_bound", lambda: (1.0, 9.0, 9.0), "corner_check"),
        ("resting_point", lambda *sides: TRIANGLE.mean(0), "rest_check"),
    ],
)
def test_a_wrong_statement_is_found(name, wrong, check, monkeypatch):
    assert getattr(convergence_checks, check)().holds
    monkeypatch.setattr(convergence_checks, name, wrong)
    assert not getattr(convergence_checks, check)().holds
