"""Figures 8, 9 and 10: the definitions, the committed numbers recomputed from the records, and
pages without runs."""

import csv
import json
import math
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers.records import committed_runs
from hypothesis import given, settings
from hypothesis import strategies as st

from dbmtl.benchmarks.base import get_benchmark
from dbmtl.experiments.records import configuration
from dbmtl.report import monitored
from dbmtl.report.results_page import open_page

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "figures" / "paper"
SHOWN = ["EW", "DB-MTL"]
T3 = 4.302652729911275  # Student's 97.5 % point for two degrees of freedom: three seeds


TITLES = {"nyuv2": "NYUv2"}
NORMS = {"norm": monitored.late_norm, "norm over loss": monitored.late_norm_over_loss}
ROUGH = {
    "roughness": monitored.of_curve(monitored.roughness),
    "roughness per descent": monitored.of_curve(monitored.per_descent),
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


# -------------------------------------------------------------------------------------- definitions


def loops(logs):
    """Roughness by a loop."""
    bends = [abs(logs[i + 1] - 2 * logs[i] + logs[i - 1]) for i in range(1, len(logs) - 1)]
    return sum(bends) / len(bends)


curves = st.lists(st.floats(-5, 5), min_size=3, max_size=12).map(np.array)


@given(st.floats(-5, 5), st.floats(-2, 2), st.integers(3, 30))
def test_figures_roughness_of_a_straight_line_is_zero(start, slope, count):
    assert monitored.roughness(start + slope * np.arange(count)) < 1e-10


@settings(max_examples=40)
@given(curves, st.floats(-5, 5), st.floats(0.1, 10))
def test_figures_roughness_knows_no_units(logs, shift, factor):
    assert monitored.roughness(logs) == pytest.approx(loops(logs), abs=1e-12)
    assert monitored.roughness(logs + shift) == pytest.approx(loops(logs), abs=1e-9)
    assert monitored.roughness(factor * logs) == pytest.approx(
        factor * loops(logs), rel=1e-9, abs=1e-12
    )
    if logs[0] > logs[-1] + 1e-3:
        descent = (logs[0] - logs[-1]) / (len(logs) - 1)
        assert monitored.per_descent(logs) == pytest.approx(
            loops(logs) / descent, rel=1e-6, abs=1e-9
        )
        assert monitored.per_descent(factor * logs) == pytest.approx(
            monitored.per_descent(logs), rel=1e-6, abs=1e-9
        )
    assert monitored.rises(logs) == sum(b > a for a, b in zip(logs, logs[1:], strict=False)) / (
        len(logs) - 1
    )


def test_figures_roughness_of_short_or_rising_curves():
    assert (
        monitored.roughness(np.array([1.0, 2.0])) is None
        and monitored.roughness(np.array([])) is None
    )
    assert (
        monitored.per_descent(np.array([1.0, 3.0, 2.0])) is None
        and monitored.rises(np.array([1.0])) is None
    )
    assert monitored.roughness(np.array([0.0, 1.0, 0.0, 1.0])) == 2


def test_figures_thinned_curves_are_read_at_even_spacing():
    losses = [math.exp(v) for v in (5, 3, 2, 1.5, 1.4, 1.2)]
    record = {"state": "finished", "curves": {"epochs": [1, 3, 5, 7, 8, 9], "train": {"a": losses}}}
    np.testing.assert_allclose(monitored.log_curve(record, "a"), [5, 3, 2, 1.5, 1.2])
    assert len(monitored.log_curve(record | {"state": "diverged"}, "a")) == 0
    record["curves"]["train"]["a"][2] = 0.0
    assert len(monitored.log_curve(record, "a")) == 0


def looked(norms, losses=None, steps=(0, 1, 2, 3), total=4):
    losses = {task: [1.0] * len(steps) for task in norms} if losses is None else losses
    return {
        "state": "finished",
        "steps": total,
        "monitors": {"steps": list(steps), "norms": norms, "losses": losses},
    }


def test_figures_late_norms_are_those_of_the_second_half():
    record = looked({"a": [100.0, 50.0, 2.0, 4.0]}, {"a": [1.0, 1.0, 0.5, 0.25]})
    assert (
        monitored.late_norm(record, "a") == 3
        and monitored.late_norm(record, "a", over_loss=True) == (4 + 16) / 2
    )
    assert monitored.late_norm(looked({"a": [9.0, 1.0, 2.0, 6.0]}, total=2), "a") == 3
    assert monitored.late_norm(record | {"steps": 5}, "a") == 4  # step 2 of 5 is in the first half
    assert monitored.late_norm(looked({"a": [1.0]}, steps=[0]), "a") is None
    assert monitored.late_norm(looked({"a": [1.0, 1.0, 0.0, 1.0]}), "a") is None
    assert monitored.late_norm(looked({"a": [1.0, 1.0, None, 1.0]}), "a") is None


def ranks(values):
    """Average ranks, by counting."""
    return np.array(
        [sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values]
    )


def centered(values):
    return values - np.mean(values)


def spearman(x, y):
    a = centered(ranks(list(x)))
    b = centered(ranks(list(y)))
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=15))
def test_figures_rank_correlation_by_counting(pairs):
    x, y = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    found = monitored.rank_correlation(x, y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(spearman(x, y), abs=1e-12)


def with_curves(norms, train, steps, total, epochs):
    record = looked(norms, steps=steps, total=total)
    scale = {"epochs": epochs}
    return record | {
        "curves": {"epochs": list(range(1, epochs + 1)), "train": train},
        "config": {"scale": scale},
    }


def test_figures_still_to_come_is_the_decrease_of_the_epochs_loss():
    train = {"a": [8.0, 4.0, 2.0], "b": [9.0, 3.0, 3.0]}
    record = with_curves(
        {"a": [1.0, 2, 3, 4, 5], "b": [5.0, 4, 3, 2, 1]}, train, [0, 3, 4, 7, 8], 12, 3
    )
    norms, decrease = monitored.still_to_come(record)
    np.testing.assert_array_equal(
        norms, [[1, 2, 3, 4], [5, 4, 3, 2]]
    )  # step 8 is in the last epoch
    np.testing.assert_allclose(decrease, np.log([[4, 4, 2, 2], [3, 3, 1, 1]]))
    np.testing.assert_allclose(
        monitored.still_to_come(record, True)[1],
        [[6 / 8, 6 / 8, 2 / 8, 2 / 8], [6 / 9, 6 / 9, 0, 0]],
    )
    record["monitors"]["losses"] = {
        "a": [99.0] * 5,
        "b": [0.1] * 5,
    }  # the batch's own loss plays no part
    np.testing.assert_array_equal(monitored.still_to_come(record)[1], decrease)
    assert monitored.still_to_come(record | {"monitors": {}})[0].size == 0


def test_figures_correlations_in_their_three_ways():
    train = {"a": [math.e**4, math.e**3, 1.0], "b": [math.e**2, math.e, 1.0]}
    record = with_curves({"a": [8.0, 9.0, 1.0], "b": [2.0, 3.0, 1.0]}, train, [0, 4, 8], 12, 3)
    found = monitored.correlations(record)  # decreases: a 4, 3; b 2, 1
    assert found["between tasks"] == pytest.approx(1) and found["over time"] == pytest.approx(-1)
    assert found["all"] == pytest.approx(spearman([8, 9, 2, 3], [4, 3, 2, 1]))
    one = with_curves({"a": [5.0]}, {"a": [2.0, 1.0]}, [0], 4, 2)
    assert monitored.correlations(one) == {}


@settings(max_examples=30)
@given(st.integers(2, 4), st.integers(2, 25), st.integers(0, 99))
def test_figures_measures_of_cosines_by_loops(pairs, looks, seed):
    values = np.random.default_rng(seed).uniform(-1, 1, (pairs, looks))
    times = np.linspace(0, 0.9, looks)
    found = monitored.cosine_measures(times, values)
    fifth = max(1, looks // 5)
    mean = [sum(values[:, k]) / pairs for k in range(looks)]
    assert found["first fifth"] == pytest.approx(sum(mean[:fifth]) / fifth)
    assert found["last fifth"] == pytest.approx(sum(mean[looks - fifth :]) / fifth)
    steps = [(values[p, k + 1] - values[p, k]) ** 2 for p in range(pairs) for k in range(looks - 1)]
    assert found["noise of one look"] == pytest.approx(math.sqrt(sum(steps) / len(steps) / 2))
    assert found["share positive"] == sum(v > 0 for v in values.flat) / (pairs * looks)
    t = centered(times)
    y = centered(np.array(mean))
    assert found["rise"] == pytest.approx((t * y).sum() / (t * t).sum(), abs=1e-9)


def test_figures_zero_is_not_a_positive_cosine():
    assert (
        monitored.cosine_measures(np.arange(4.0), np.array([[0.0, -0.0005, 0.1, -0.2]]))[
            "share positive"
        ]
        == 0.25
    )


def test_figures_noise_of_a_look_is_its_deviation():
    noise = np.random.default_rng(0).normal(0, 0.01, (3, 4000)) + np.linspace(-0.02, 0.02, 4000)
    assert monitored.cosine_measures(np.linspace(0, 1, 4000), noise)[
        "noise of one look"
    ] == pytest.approx(0.01, rel=0.03)


def test_figures_cosines_without_a_value_are_left_out():
    looks = {"steps": [0, 5, 10], "cosines": {"a|b": [0.1, None, 0.3], "a|c": [0.4, 0.5, 0.6]}}
    times, values = monitored.cosines_of(
        {"state": "finished", "steps": 20, "monitors": looks}, ["a|b", "a|c"]
    )
    np.testing.assert_array_equal(times, [0, 0.5])
    np.testing.assert_array_equal(values, [[0.1, 0.3], [0.4, 0.6]])
    assert (
        monitored.cosine_measures(
            *monitored.cosines_of({"state": "failed", "steps": 20, "monitors": looks}, ["a|b"])
        )
        == {}
    )


# --------------------------------------------------------------------------- pages of faked records


def record(method, seed, norm=1.0, at_floor=False, scale="cpu"):
    benchmark = get_benchmark("nyuv2")
    tasks = benchmark.task_names
    test = {t: {m: 10.0 for m in metrics} for t, metrics in benchmark.directions.items()}
    floors = {
        t: {m: 10 - 5 * (b == "up") + 5 * (b == "down") for m, b in ms.items()}
        for t, ms in benchmark.directions.items()
    }
    if at_floor:
        test["depth"] = floors["depth"]
    looks = {
        "steps": [0, 6, 8],
        "norms": {t: [9.0, norm, norm] for t in tasks},
        "losses": {t: [1.0] * 3 for t in tasks},
        "cosines": {f"{a}|{b}": [0.1, 0.2, 0.3] for a, b in combinations(tasks, 2)},
    }
    wave = [4.0, 2 * norm, 2.0, 1.0]
    return {
        "identity": f"{method}{seed}",
        "config": configuration("nyuv2", method, seed, scale),
        "state": "finished",
        "step": 10,
        "steps": 10,
        "data": {"hash": "x", "note": "real"},
        "device": "cpu: test",
        "notes": [],
        "directions": benchmark.directions,
        "floors": {"test": floors, "validation": {}},
        "parameters": {"shared": 100},
        "monitors": {} if method == "STL" else looks,
        "selected": {
            rule: {"epoch": 1, "test": test}
            for rule in ("best validation epoch", "average of the last ten epochs")
        },
        "curves": {"epochs": [1, 2, 3, 4], "train": {t: wave for t in tasks}},
    }


def page_of(*runs):
    stl = [record("STL", seed) for seed in range(3)]
    return open_page("15_paper/14_figure8", "nyuv2", [*stl, *runs], None, True, SHOWN)


def rows_of(measures, *runs):
    """Rows of ratios of faked runs, by task."""
    rows = monitored.ratio_rows({"nyuv2": page_of(*runs)}, TITLES, measures)
    return {row["task"]: row for row in rows}


def test_figures_norm_ratios_are_paired_by_seed():
    ratios = [0.5, 0.4, 0.5]
    runs = [record("EW", s, 3.0 + s) for s in range(3)]
    runs += [record("DB-MTL", s, (3.0 + s) * ratio) for s, ratio in enumerate(ratios)]
    rows = rows_of(NORMS, *runs)
    logs = np.log(ratios)
    half = T3 * logs.std(ddof=1) / math.sqrt(3)
    for row in rows.values():
        assert row["norm"] == pytest.approx(math.exp(logs.mean()))
        limits = (math.exp(logs.mean() - half), math.exp(logs.mean() + half))
        assert (row["norm low"], row["norm high"]) == pytest.approx(limits)
        assert row["seeds"] == 3
        assert row["benchmark"] == "NYUv2"
        assert row["norm, verdict"] == "same sign"
    assert list(rows) == ["geometric mean", "segmentation", "depth", "normal"]


def test_figures_norm_ratio_of_all_tasks_is_their_geometric_mean():
    ew = record("EW", 0, 2.0)
    ours = record("DB-MTL", 0, 2.0)
    ours["monitors"]["norms"] |= {"segmentation": [9.0, 16.0, 16.0], "depth": [9.0, 0.5, 0.5]}
    ratios = {task: row["norm"] for task, row in rows_of(NORMS, ew, ours).items()}
    assert ratios == pytest.approx(
        {"segmentation": 8, "depth": 0.25, "normal": 1, "geometric mean": 2 ** (1 / 3)}
    )


def test_figures_norm_verdicts():
    def words(*runs):
        return [row["norm, verdict"] for row in rows_of(NORMS, *runs).values()]

    ew = [record("EW", s) for s in range(3)]
    longer = [record("DB-MTL", s, 2 + 0.01 * s) for s in range(3)]
    assert words(*ew, *longer) == ["opposite sign"] * 4
    same = [record("DB-MTL", s, 1 + 0.1 * (s - 1)) for s in range(3)]
    assert words(*ew, *same) == ["undecided"] * 4
    assert words(ew[0], record("DB-MTL", 0, 0.5)) == ["one run"] * 4
    assert words(*ew) == ["not run"] * 4
    shorter = [record("DB-MTL", s, 0.5 + 0.01 * s, at_floor=s == 0) for s in range(3)]
    at_floor = "none: at its floor"
    assert words(*ew, *shorter) == [at_floor, "same sign", at_floor, "same sign"]


def test_figures_roughness_verdicts_need_three_seeds():
    ew = [record("EW", s) for s in range(3)]
    ours = [record("DB-MTL", s, 1.5 + 0.01 * s) for s in range(3)]
    logs = [np.log([4, 2 * n, 2, 1]) for n in (1, 1.5, 1.51, 1.52)]
    expected = math.exp(np.mean([math.log(loops(one) / loops(logs[0])) for one in logs[1:]]))
    for row in rows_of(ROUGH, *ew, *ours).values():
        assert row["roughness"] == pytest.approx(expected)
        assert row["roughness per descent"] == pytest.approx(expected)
        word = "same sign" if expected < 1 else "opposite sign"
        assert row["roughness, verdict"] == word
        assert row["seeds"] == 3
    one_seed = rows_of(ROUGH, ew[0], ours[0]).values()
    assert {row["roughness per descent, verdict"] for row in one_seed} == {"one run"}


def test_figures_tasks_at_their_floor_get_no_verdict_on_roughness():
    ours = [record("DB-MTL", s, 1.5 + 0.01 * s, at_floor=True) for s in range(3)]
    rows = rows_of(ROUGH, *(record("EW", s) for s in range(3)), *ours)
    at_floor = {
        task: row["roughness, verdict"] == "none: at its floor" for task, row in rows.items()
    }
    assert at_floor == {
        "segmentation": False,
        "depth": True,
        "normal": False,
        "geometric mean": True,
    }


def test_figures_correlation_verdicts():
    falling = [record("EW", s, 1.0) for s in range(3)]
    rising = [record("DB-MTL", s, 50.0 + s) for s in range(3)]
    for run in [*falling, *rising]:
        run["steps"] = 60  # looks in epochs 1, 3 and 4 of 24
    for run in rising:  # the loss falls throughout, the norm grows
        run["curves"]["train"] = {
            task: [400.0, 200.0, 20.0, 1.0] for task in run["curves"]["train"]
        }
    page = page_of(*falling, *rising)
    words = {
        row["method"]: row["all, verdict"]
        for row in monitored.correlation_rows({"nyuv2": page}, TITLES)
    }
    assert words == {"EW": "same sign", "DB-MTL": "opposite sign"}


def test_figures_cosine_claim_is_paired_by_seed():
    runs = []
    for seed in range(3):
        low = record("EW", seed)
        high = record("DB-MTL", seed)
        for run, values in ((low, [-0.2, -0.1, seed / 10]), (high, [-0.1, 0.4, 0.2 + seed / 10])):
            run["monitors"]["cosines"] = dict.fromkeys(run["monitors"]["cosines"], values)
        runs += [low, high]
    page = page_of(*runs)
    claim = {row["quantity"]: row for row in monitored.cosine_claim(page, "NYUv2")}
    assert claim["last fifth, DB-MTL - EW"]["ours"].mean == pytest.approx(0.2)
    # though the seeds differ by as much; the paper's size is 0.01
    assert claim["last fifth, DB-MTL - EW"]["verdict"] == "same sign, another size"
    assert claim["last fifth, DB-MTL"]["ours"].mean == pytest.approx(0.3)
    difference = monitored.cosine_rows(page, "all", monitored.cosine_pairs(page))[-1]
    assert difference["method"] == "DB-MTL - EW"
    assert difference["last fifth"].mean == pytest.approx(0.2)
    assert difference["first fifth"].mean == pytest.approx(0.1)


def test_figures_without_runs_say_so(monkeypatch, tmp_path):
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    page = open_page("15_paper/14_figure8", "nyuv2", methods=SHOWN)
    assert page.records == []
    for measures in (NORMS, ROUGH):
        rows = monitored.ratio_rows({"nyuv2": page}, TITLES, measures)
        words = {v for row in rows for k, v in row.items() if k.endswith("verdict")}
        assert words == {"not run"}
        assert monitored.ratio_frame({"nyuv2": page}, TITLES, measures).empty
        assert monitored.counted(rows, next(iter(measures))).endswith(": not run.")
    rows = monitored.correlation_rows({"nyuv2": page}, TITLES)
    words = {v for row in rows for k, v in row.items() if k.endswith("verdict")}
    assert words == {"not run"}
    claim = monitored.cosine_claim(page, "NYUv2")
    assert {row["verdict"] for row in claim} == {row["ours"] for row in claim} == {"not run"}


# --------------------------------------------------- the committed numbers, from the records' files


def table(stem):
    path = FIGURES / f"{stem}.csv"
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def runs_of(benchmark, scale):
    """{method: {seed: record}} of the files that belong to the present configuration."""
    runs = committed_runs(ROOT / "figures" / "runs", benchmark, scale)
    return {method: runs.get(method, {}) for method in SHOWN}


def interval(values):
    """Mean and limits as they stand in a table; no limits for one value."""
    values = np.array(values)
    if len(values) == 1:
        return values[0], None, None
    assert len(values) == 3
    half = T3 * values.std(ddof=1) / math.sqrt(3)
    return values.mean(), values.mean() - half, values.mean() + half


def sign_verdict(low, high):
    """The verdict on a difference of three seeds that should be positive."""
    if low > 0:
        return "same sign"
    return "opposite sign" if high < 0 else "undecided"


def agree(row, column, expected, transform=lambda v: v):
    prefix = f"{column} " if f"{column} low" in row else ""
    names = [column, f"{prefix}low", f"{prefix}high"]
    for name, value in zip(names, expected, strict=True):
        if value is not None:
            assert float(row[name]) == pytest.approx(transform(value), rel=2e-5, abs=2e-6), (
                row,
                name,
            )


def tasks_of(row, runs):
    names = list(runs["EW"][0]["monitors"]["norms"])
    return names if row["task"] == "geometric mean" else [row["task"]]


BENCHMARKS = {
    "NYUv2": "nyuv2",
    "Office-31": "office31",
    "QM9": "qm9",
    "PACS": "pacs",
    "Cityscapes": "cityscapes",
    "generated streets": "cityscapes",
}


def benchmark_of(row):
    return BENCHMARKS[row["benchmark"].removeprefix("on ")]


@pytest.mark.full
def test_figures_8_numbers_are_those_of_the_records():
    rows = [row for row in table("figure8_numbers") if row["scale"] != "not run"]
    assert {row["benchmark"] for row in rows} >= {"on Office-31", "on QM9"}
    for row in rows:
        runs = runs_of(benchmark_of(row), row["scale"])
        logs = []
        for seed in sorted(set(runs["EW"]) & set(runs["DB-MTL"])):
            total = 0.0
            for task in tasks_of(row, runs):
                late = []
                for method in ("DB-MTL", "EW"):
                    run = runs[method][seed]
                    looks = zip(
                        run["monitors"]["steps"], run["monitors"]["norms"][task], strict=True
                    )
                    kept = [norm for step, norm in looks if 2 * step >= run["steps"]]
                    late.append(sum(kept) / len(kept))
                total += math.log(late[0] / late[1])
            logs.append(total / len(tasks_of(row, runs)))
        agree(row, "norm", interval(logs), math.exp)
        mean, low, high = interval(logs)
        if low is None:
            verdict = "one run"
        else:
            verdict = sign_verdict(-high, -low)  # the norms of DB-MTL should be the smaller
        # a task at its floor by a rule of the epoch has none by that rule
        assert row["norm, verdict"].partition(" (")[0] in (verdict, "none: at its floor")
        assert int(row["seeds"]) == len(logs)


@pytest.mark.full
def test_figures_still_to_come_numbers_are_those_of_the_records():
    for row in table("figure8_still_to_come"):
        if row["scale"] == "not run":
            continue
        pooled = []
        between = []
        for run in runs_of(benchmark_of(row), row["scale"])[row["method"]].values():
            epochs = run["config"]["scale"]["epochs"]
            tasks = list(run["monitors"]["norms"])
            each = []
            for look, step in enumerate(run["monitors"]["steps"]):
                epoch = step * epochs // run["steps"]
                if epoch < epochs - 1:
                    losses = [run["curves"]["train"][t] for t in tasks]
                    each.append(
                        [
                            (run["monitors"]["norms"][t][look], math.log(c[epoch] / c[-1]))
                            for t, c in zip(tasks, losses, strict=True)
                        ]
                    )
            pooled.append(spearman(*zip(*sum(each, []), strict=True)))
            between.append(np.mean([spearman(*zip(*one, strict=True)) for one in each]))
        agree(row, "all", interval(pooled))
        agree(row, "between tasks", interval(between))


@pytest.mark.full
def test_figures_9_numbers_are_those_of_the_records():
    for row in table("figure9_numbers"):
        if row["scale"] == "not run":
            continue
        runs = runs_of(benchmark_of(row), row["scale"])
        rough = []
        descent = []
        for seed in sorted(set(runs["EW"]) & set(runs["DB-MTL"])):
            logs = {
                m: {
                    t: [math.log(v) for v in runs[m][seed]["curves"]["train"][t]]
                    for t in tasks_of(row, runs)
                }
                for m in SHOWN
            }
            ratios = [loops(logs["DB-MTL"][t]) / loops(logs["EW"][t]) for t in logs["EW"]]
            falls = [
                (logs["DB-MTL"][t][0] - logs["DB-MTL"][t][-1])
                / (logs["EW"][t][0] - logs["EW"][t][-1])
                for t in logs["EW"]
            ]
            rough.append(np.mean(np.log(ratios)))
            descent.append(np.mean(np.log(ratios) - np.log(falls)))
        agree(row, "roughness", interval(rough), math.exp)
        agree(row, "roughness per descent", interval(descent), math.exp)


def test_figures_10_numbers_are_those_of_the_records():
    rows = [row for row in table("figure10_numbers") if row["benchmark"] == "Office-31"]
    runs = runs_of("office31", "cpu")
    assert {len(seeds) for seeds in runs.values()} == {3} and len(rows) == 12
    measured = {}
    for method, seeds in runs.items():
        for seed, run in seeds.items():
            looks = run["monitors"]["cosines"]
            fifth = len(run["monitors"]["steps"]) // 5
            mean = [sum(values) / 3 for values in zip(*looks.values(), strict=True)]
            for pair, c in {**looks, "mean of the pairs": mean}.items():
                measured.setdefault((pair, method), {})[seed] = (
                    np.mean(c[:fifth]),
                    np.mean(c[-fifth:]),
                    np.mean(np.array(c) > 0),
                )
    for row in rows:
        if row["method"] == "DB-MTL - EW":
            values = [
                np.subtract(measured[row["pair"], "DB-MTL"][s], measured[row["pair"], "EW"][s])
                for s in range(3)
            ]
        else:
            values = [measured[row["pair"], row["method"]][s] for s in range(3)]
        agree(row, "first fifth", interval([v[0] for v in values]))
        agree(row, "last fifth", interval([v[1] for v in values]))
        if row["pair"] != "mean of the pairs":
            agree(row, "share positive", interval([v[2] for v in values]))


def test_figures_10_claim_follows_its_numbers():
    rows = {
        (row["pair"], row["method"]): row
        for row in table("figure10_numbers")
        if row["benchmark"] == "Office-31"
    }
    claim = {
        row["quantity"]: row for row in table("figure10_claim") if row["benchmark"] == "Office-31"
    }
    for name, method, column in (
        ("last fifth, DB-MTL - EW", "DB-MTL - EW", "last fifth"),
        ("rise, DB-MTL - EW", "DB-MTL - EW", "rise"),
        ("last fifth, DB-MTL", "DB-MTL", "last fifth"),
    ):
        row = rows["mean of the pairs", method]
        low = float(row[f"{column} low"])
        high = float(row[f"{column} high"])
        limits = (float(claim[name]["ours low"]), float(claim[name]["ours high"]))
        assert limits == pytest.approx((low, high))
        word = sign_verdict(low, high)
        printed = claim[name]["paper, read off"]
        if printed != "above 0" and word != "opposite sign":
            word += "" if low <= float(printed) <= high else ", another size"
        assert claim[name]["verdict"].partition(" (")[0] == word


def test_figures_8_to_10_are_small_and_have_cards():
    for stem in ("figure8", "figure9", "figure10"):
        assert (FIGURES / f"{stem}.png").stat().st_size < 120_000
        assert (FIGURES / f"{stem}.svg").stat().st_size < 150_000
        card = json.loads((FIGURES / "cards" / f"{stem}.json").read_text())
        assert (ROOT / "nbs" / f"{card['notebook']}.ipynb").exists()
        assert card["caption"].endswith(".")
        assert (FIGURES / f"{stem}.csv").exists()
