"""The ledger of claims: a row for every claim, verdicts by the rules, and numbers that another
route gives as well."""

import ast
import csv
import json
import math
import os
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from dbmtl.benchmarks.base import get_benchmark
from dbmtl.experiments.intervals import Interval
from dbmtl.experiments.method_labels import parse_method
from dbmtl.experiments.records import configuration, read_records, run_identity
from dbmtl.report import claims_computed
from dbmtl.report.answers import committed_evidence
from dbmtl.report.claims import common_profile
from dbmtl.report.claims_computed import (
    GRADIENT_METHODS,
    LOSS_METHODS,
    cost_rows,
    gramians,
    nash_errors,
    norm_ratios,
)
from dbmtl.report.claims_in_training import cosine_measure, still_to_come
from dbmtl.report.claims_page import (
    forest_figure,
    forest_pages,
    is_drawn,
    is_open,
    ledger_rows,
    open_rows,
    table_rows,
    tally,
)
from dbmtl.report.comparison import RULES, estimate, minus
from dbmtl.report.ledger import (
    BY_QUESTIONS,
    PLACES,
    TITLES,
    Place,
    Places,
    checked,
    compared,
    counted,
    said,
    seeds_to_decide,
)
from dbmtl.report.monitored import late_norm, log_mean, of_curve, per_descent, roughness
from dbmtl.report.paper import paper_claims
from dbmtl.report.style import palette_png, use_style

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = (
    "16_ledger",
    "17_claims",
    "18_claims_in_training",
    "19_claims_computed",
    "20_claims_page",
)
IDS = [claim["id"] for claim in paper_claims()]
COMPUTED = {"holds numerically", "does not hold", "counted", "open: not an experiment"}
JUDGED = {
    "reproduced",
    "not reproduced",
    "same sign",
    "opposite sign",
    "no difference that matters",
    "undecided",
    "one run",
    "none",
    "not run",
}


def words_of(verdict):
    """The words of a verdict: one, or one a rule of the epoch; sizes left out."""
    parts = [re.sub(r" \((?:best|last ten) epochs?\)", "", part) for part in verdict.split("; ")]
    return {part.removesuffix(", another size") for part in parts}


@pytest.fixture(scope="module")
def places():
    """The committed records; nothing is trained and nothing is written."""
    return Places(read_records(ROOT / "figures" / "runs"), committed_evidence())


@pytest.fixture(scope="module")
def rows(places):
    yield ledger_rows(places)
    plt.close("all")


def record(benchmark, label, seed, scale, gain=0.0, at_floor=()):
    """Every metric of STL is 10; a gain of g percent moves it by g/10 to its better side."""
    benchmark = get_benchmark(benchmark)
    method, hyper = parse_method(label)
    floors = {}
    test = {}
    for task, metrics in benchmark.directions.items():
        signs = {metric: 1 if better == "up" else -1 for metric, better in metrics.items()}
        floors[task] = {metric: 10 - 5 * sign for metric, sign in signs.items()}
        test[task] = {metric: 10 + sign * gain / 10 for metric, sign in signs.items()}
        if task in at_floor:
            test[task] = dict(floors[task])
    config = configuration(benchmark, method, seed, scale, hyper)
    return {
        "identity": run_identity(config, "x"),
        "config": config,
        "state": "finished",
        "data": {"hash": "x", "note": ""},
        "directions": benchmark.directions,
        "floors": {"test": floors},
        "monitors": {},
        "curves": {},
        "selected": {
            "best validation epoch": {"test": test},
            "average of the last ten epochs": {"test": test},
        },
    }


def place(name, scale, gains, **options):
    """A place where each method has these improvements over STL, a number a seed."""
    most = max(map(len, gains.values()))
    runs = {"STL": [0.0] * most} | gains
    records = [
        record(PLACES[name], m, s, scale, g, **(options if m == "DB-MTL" else {}))
        for m, values in runs.items()
        for s, g in enumerate(values)
    ]
    return Place(name, tuple(records))


# ------------------------------------------------------------------------------------------ the ids


@pytest.mark.full
def test_claims_have_a_row_each(rows):
    assert list(dict.fromkeys(row.claim for row in rows)) == IDS
    with open(ROOT / "figures/paper/claims.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert list(dict.fromkeys(row["id"] for row in table)) == IDS
    statements = {claim["id"]: claim["statement"] for claim in paper_claims()}
    assert all(row["statement"] == statements[row["id"]] for row in table)


def test_claims_are_those_of_the_paper():
    beside = Path(os.environ.get("DBMTL_DATA") or ROOT / "nowhere").parent / "paper" / "claims.csv"
    if not beside.exists():
        pytest.skip("no list of claims beside DBMTL_DATA")
    with open(beside, newline="", encoding="utf-8") as file:
        assert [(row["id"], row["kind"]) for row in csv.DictReader(file)] == [
            (c["id"], c["kind"]) for c in paper_claims()
        ]


@pytest.mark.full
def test_claims_rows_say_where_and_how(rows):
    for row in rows:
        assert row.quantity and row.place in TITLES
        assert words_of(row.verdict) <= JUDGED | COMPUTED, row
        assert (row.scale == "-") == (row.verdict == "not run" or row.place in ("computed", "-"))
        assert row.scale != "smoke"
        intervals = [value for value in row.ours.values() if isinstance(value, Interval)]
        assert all(isinstance(x, Interval | float | str) for x in row.ours.values())
        if intervals:
            assert row.seeds == max(interval.count for interval in intervals)
        if row.scale != "paper":
            assert "reproduced" not in row.verdict
        assert row.is_own or not isinstance(row.paper, float)
    assert {row.verdict for row in rows if row.claim == "C27"} == {"open: not an experiment"}
    assert {row.verdict for row in rows if row.claim in ("C06", "C10", "C25", "N01")} == {
        "holds numerically"
    }


@pytest.mark.full
def test_claims_of_all_benchmarks_have_a_row_for_each(rows):
    def own_places(claim):
        return {row.place for row in rows if row.claim == claim and row.is_own}

    six = {"nyuv2", "nyuv2_segnet", "cityscapes", "qm9", "office31", "officehome"}
    assert own_places("C01") == six and own_places("C28") == six
    assert own_places("C11") == own_places("C12") == six - {"nyuv2_segnet"}
    four = six - {"nyuv2_segnet", "qm9"}
    assert own_places("C02") == own_places("C07") == own_places("C09") == four
    assert [
        sum(row.claim == claim and row.place == "nyuv2" for row in rows) for claim in ("C13", "C15")
    ] == [7, 12]
    assert sum(row.claim == "C17" for row in rows) == 18


# -------------------------------------------------------------------------------- nobody types them


def test_claims_verdicts_are_not_typed():
    """No text of the exported cells is a verdict, but for derivations, counts and open questions.

    `not run` and `none` also say why there is no number.
    """
    typed = set()
    count = 0
    for name in LIBRARY:
        for cell in nbformat.read(ROOT / "nbs/11_report" / f"{name}.ipynb", 4).cells:
            if cell.cell_type != "code" or "#| export" not in cell.source:
                continue
            count += 1
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    typed |= {word for word in JUDGED | COMPUTED if node.value.strip() == word}
    assert count > 20
    allowed = {"counted", "does not hold", "holds numerically", "none", "not run"}
    # of these three the page counts the rows, and asks whether a row is open
    assert typed - allowed == {"reproduced", "same sign", "opposite sign", "undecided", "one run"}
    page = nbformat.read(ROOT / "nbs/15_paper/17_claims.ipynb", 4)
    source = "".join(cell.source for cell in page.cells if cell.cell_type == "code")
    assert not re.search("reproduced|same sign|opposite sign|undecided|one run", source)


def test_claims_computed_words_follow_from_numbers():
    word = {
        value: checked("C06", "x", value, 0.5).verdict
        for value in (0.4, 0.5, 0.6, math.nan, math.inf)
    }
    assert list(word.values()) == ["holds numerically"] * 2 + ["does not hold"] * 3
    here = place("nyuv2", "cpu", {"DB-MTL": [1.0]})
    assert counted("C28", "x", here, {"best": "1 of 2"}).verdict == "counted"
    assert counted("C28", "x", here, {}).verdict == "not run"


# ---------------------------------------------------------------------------------- made-up records

UP, DOWN, MIXED = [2.0, 2.1, 2.2], [-2.0, -2.1, -2.2], [2.0, -2.0, 0.5]


@pytest.mark.parametrize(
    "name, scale, values, word",
    [
        ("nyuv2", "paper", UP, "reproduced"),
        ("nyuv2", "paper", DOWN, "not reproduced"),
        ("nyuv2", "paper", MIXED, "undecided"),
        ("nyuv2", "cpu", UP, "same sign, another size"),
        ("nyuv2", "cpu", DOWN, "opposite sign"),
        ("nyuv2", "gpu", UP, "same sign, another size"),
        ("nyuv2", "paper-scratch", UP, "same sign, another size"),
        ("nyuv2", "paper", UP[:2], "undecided"),
        ("nyuv2", "paper", UP[:1], "one run"),
        ("pacs", "paper", UP, "same sign"),
        ("pacs", "paper", DOWN, "opposite sign"),
        ("nyuv2-sgd", "paper", UP, "same sign"),
        ("nyuv2", "smoke", UP, "none"),
        ("streets", "generated", UP, "same sign"),
    ],
)
def test_claims_verdicts_of_made_up_records(name, scale, values, word):
    here = place(name, scale, {"DB-MTL": values, "EW": [0.0] * 3})
    row = compared("C02", here, minus("DB-MTL", "STL"), 1.15)
    assert row.verdict == word and row.seeds == len(values) and row.scale == scale
    assert row.is_own == (name == "nyuv2") and row.benchmark.startswith("on ") != row.is_own
    assert row.ours["best"].mean == pytest.approx(np.mean(values))
    opposite = {
        "reproduced": "not reproduced",
        "same sign": "opposite sign",
        "same sign, another size": "opposite sign",
    }
    turned = compared("C02", here, minus("STL", "DB-MTL"), 1.15).verdict
    back = {"not reproduced": "reproduced", "opposite sign": "same sign"}
    assert turned.removesuffix(", another size") == (opposite | back).get(word, word)


def test_claims_verdicts_need_runs_floors_and_all_methods():
    good = place("nyuv2", "paper", {"DB-MTL": UP})
    weights = minus("DB-MTL", "STL")
    partial = compared("C02", good, weights, 1.0, whole=False).verdict
    assert partial == "same sign, another size"
    assert compared("C02", good, minus("DB-MTL", "EW"), 1.0).verdict == "not run"
    floored = place("nyuv2", "paper", {"DB-MTL": UP}, at_floor=["depth"])
    row = compared("C02", floored, weights, 1.0)
    assert row.verdict == "none" and "depth" in row.ours["best"]
    empty = Place("nyuv2")
    row = compared("C02", empty, weights, 1.0)
    assert row.verdict == "not run" and (row.scale, row.seeds) == ("-", 0)
    one = compared("C21", Place("nyuv2 (MTAN)"), weights, 1.0)
    assert one.benchmark == "NYUv2 (MTAN)"


def test_claims_against_stl_know_the_spread_of_stl():
    """STL's own runs count: each is the baseline of the method's run of its seed."""
    runs = [record("nyuv2", "STL", s, "cpu", g) for s, g in enumerate((-30.0, 0.0, 30.0))]
    runs += [record("nyuv2", "DB-MTL", s, "cpu", 2.0) for s in range(3)]
    row = compared("C02", Place("nyuv2", tuple(runs)), minus("DB-MTL", "STL"), 1.0)
    assert row.verdict == "undecided"
    assert 0 < row.ours["best"].mean < 15 and row.ours["best"].half_width > 50


def test_claims_are_held_against_the_sign_in_print():
    here = place("office31", "cpu", {"DB-MTL": DOWN, "DB-MTL(beta=0)": [0.0, 0.1, 0.0]})
    weights = minus("DB-MTL", "DB-MTL(beta=0)")
    assert [compared("C17", here, weights, paper).verdict for paper in (0.3, -0.3, None)] == [
        "opposite sign",
        "same sign, another size",
        "opposite sign",
    ]
    assert compared("C17", here, weights, sign=-1).verdict == "same sign"


def test_claims_have_both_words_where_the_rules_of_the_epoch_differ():
    runs = [record("office31", "STL", s, "cpu") for s in range(3)]
    for seed, (gain, other) in enumerate(zip(UP, MIXED, strict=True)):
        ours = record("office31", "DB-MTL", seed, "cpu", gain)
        late = record("office31", "DB-MTL", seed, "cpu", other)["selected"]
        kind = "average of the last ten epochs"
        runs.append(ours | {"selected": ours["selected"] | {kind: late[kind]}})
    row = compared("C02", Place("office31", tuple(runs)), minus("DB-MTL", "STL"), 2.1)
    assert row.verdict == "same sign (best epoch); undecided (last ten epochs)"
    assert is_open(row) and tally([row])[0]["verdict"] == "changes with the epoch"


def test_claims_are_read_at_the_best_scale_that_has_them():
    runs = [
        record("qm9", m, s, at)
        for at in ("early", "cpu")
        for m in ("STL", "EW", "DB-MTL")
        for s in range(2)
    ]
    runs += [
        record("qm9", "PCGrad", 0, "early"),
        record("cityscapes", "EW", 0, "generated"),
        record("qm9", "EW", 0, "smoke"),
    ]
    old = record("qm9", "UW", 0, "cpu")
    runs.append(old | {"config": old["config"] | {"protocol": 0}})
    runs.append(record("qm9", "DB-MTL(beta=0.1)", 0, "cpu"))
    places = Places(runs)
    assert places("qm9").scale == "cpu"
    assert places("qm9").comparison.labels == ["STL", "EW", "DB-MTL"]
    assert places("qm9", ("PCGrad", "EW")).scale == "early"
    sweep = places("qm9", ("DB-MTL(beta=0.1)",))
    assert sweep.scale == "cpu" and "DB-MTL" not in sweep.comparison.labels
    assert places("qm9", ("CAGrad", "EW")).scale == "cpu"
    scales = [places(name).scale for name in ("cityscapes", "streets", "pacs")]
    assert scales == ["-", "generated", "-"]


# ------------------------------------------------------------------------------- what it would take


def test_claims_seeds_that_would_decide():
    """By the definition, with scipy: the first count whose interval leaves zero."""
    values = [0.2, 1.0, 0.9]
    spread = np.std(values, ddof=1)
    halves = {n: scipy.stats.t.ppf(0.975, n - 1) * spread / np.sqrt(n) for n in range(3, 31)}
    expected = next(n for n, half in halves.items() if half < np.mean(values))
    assert seeds_to_decide(estimate(values)) == expected > 3
    assert seeds_to_decide(estimate([-1.0, 1.0, 0.001])) is None


@pytest.mark.full
def test_claims_that_are_open_say_what_they_would_take(places, rows):
    for row in rows:
        if row.missing:
            assert is_open(row)
        if is_open(row):
            assert row.missing or row.needs, row
    table = table_rows(rows, places)
    for row, cells in zip(rows, table, strict=True):
        assert cells["more runs"] == (len(row.missing) or None)
        assert bool(cells["what it would take"]) == bool(row.missing or row.needs)
    done = {
        (r["config"]["benchmark"], r["config"]["scale"]["name"], r["config"]["method"])
        for r in places.committed
        if r["state"] == "finished"
    }
    for line in open_rows(rows, places):
        is_measured = any(run[:2] == (line["benchmark"], line["scale"]) for run in done)
        assert isinstance(line["core hours"], float) == is_measured


def test_claims_missing_runs_are_those_that_nobody_made():
    here = place("office31", "cpu", {"DB-MTL": [0.5, 0.4], "EW": [0.0, 0.2]})
    row = compared("C11", here, minus("DB-MTL", "EW"), 1.0)
    assert row.verdict == "undecided" or row.verdict.startswith("undecided,")
    assert {(run.label, run.seed) for run in row.missing} == {
        ("STL", 2),
        ("DB-MTL", 2),
        ("EW", 2),
    }
    seconds = Places([dict(r, seconds={"train": 3000, "evaluation": 600}) for r in here.records])
    assert table_rows([row], seconds)[0]["core hours"] == pytest.approx(3)


# ------------------------------------------------------------------------------------ another route


def runs_of(records, benchmark, scale, label, protocol):
    method, hyper = parse_method(label)
    wanted = {"benchmark": benchmark, "method": method, "hyper": hyper, "protocol": protocol}
    done = [
        r for r in records if r["state"] == "finished" and r["config"]["scale"]["name"] == scale
    ]
    return {
        r["config"]["seed"]: r
        for r in done
        if all(r["config"][key] == value for key, value in wanted.items())
    }


KINDS = {"best": "best validation epoch", "last ten": "average of the last ten epochs"}


def metrics_of(record, rule):
    """[metrics] signed so that more is better, their floors, and the task of each."""
    test = record["selected"][KINDS[rule]]["test"]
    names = [(t, m) for t, metrics in record["directions"].items() for m in metrics]
    signs = np.array([1 if record["directions"][t][m] == "up" else -1 for t, m in names])
    return (
        (np.array([source[t][m] for t, m in names]) for source in (test, record["floors"]["test"])),
        signs,
        [t for t, _ in names],
    )


def evidence_for(places, row):
    """The runs of a question behind a row with rates of each method's own."""
    for evidence in places.evidence:
        if evidence.place == row.place and {*row.weights, evidence.baseline} <= evidence.labels:
            return evidence
    raise AssertionError(row)


def other_route(records, row, rule, baseline="STL", effect=None):
    """Mean, half width, seeds and word of a row, from the records; None without a number."""
    weights = row.weights
    for protocol in (2, 1):  # the newest that has all
        scale = row.scale.removesuffix(", own rates")
        place = (PLACES[row.place], scale)
        runs = {label: runs_of(records, *place, label, protocol) for label in {*weights, baseline}}
        if all(runs.values()):
            break
    else:
        return None
    if any(KINDS[rule] not in r["selected"] for found in runs.values() for r in found.values()):
        return None
    values = {}
    for label, found in runs.items():
        for seed, one in found.items():
            (test, floor), signs, tasks = metrics_of(one, rule)
            counts = np.array([row.task in (None, t) for t in tasks])
            better = signs * (test - floor) / np.abs(floor)
            shown = {t for t, c in zip(tasks, counts, strict=True) if c}
            if any(better[[t == task for t in tasks]].mean() <= 0.05 for task in shown):
                return None
            values.setdefault(label, {})[seed] = test
    base = values[baseline]  # the run of the same seed
    shares = np.array([1 / tasks.count(t) * c for t, c in zip(tasks, counts, strict=True)])
    shares = shares / len(shown)
    gain = {
        label: {
            s: float(shares @ (100 * signs * (v - base[s]) / base[s]))
            for s, v in found.items()
            if s in base
        }
        for label, found in values.items()
    }
    seeds = [s for s in range(200) if all(s in gain[label] for label in weights)]
    each = [sum(w * gain[label][s] for label, w in weights.items()) for s in seeds]
    half = math.inf
    if len(each) > 1:
        quantile = scipy.stats.t.ppf(0.975, len(each) - 1)
        half = quantile * np.std(each, ddof=1) / np.sqrt(len(each))
    mean = float(np.mean(each))
    paper = re.match(r"-?[\d.]+(e-\d+)?", str(row.paper))
    printed = float(paper[0]) if paper else 1
    if len(each) < 3 or abs(mean) <= half:
        word = "one run" if len(each) == 1 else "undecided"
        if effect is not None and max(abs(mean - half), abs(mean + half)) < effect:
            return mean, half, len(each), "no difference that matters"
    elif row.scale == "paper" and row.is_own:
        word = "reproduced" if mean * printed > 0 else "not reproduced"
    else:
        word = "same sign" if mean * printed > 0 else "opposite sign"
    is_another = row.is_own and paper and abs(mean - printed) > half
    if is_another and len(each) > 2 and word in ("undecided", "same sign"):
        word += ", another size"
    return mean, half, len(each), word


@pytest.mark.full
@pytest.mark.parametrize("rule", RULES)
def test_claims_rows_are_what_the_files_say(rows, places, rule):
    records = [json.loads(json.dumps(record)) for record in places.committed]
    compared_rows = 0
    for row in rows:
        # C12 on another benchmark is held against the sign printed for the one it stands for
        is_foreign = row.claim in ("C11", "C12") and not row.is_own
        if row.unit != "percent" or row.claim[0] == "N" or not row.weights or is_foreign:
            continue
        found = None
        if row.scale.endswith("own rates"):
            one = evidence_for(places, row)
            effect = one.effect if row.task == one.task else None  # fixed for that task, or for all
            found = other_route(one.records, row, rule, one.baseline, effect)
        elif row.scale != "-":
            found = other_route(records, row, rule)
        ours = row.ours[rule]
        if found is None:
            assert isinstance(ours, str), row
            continue
        mean, half, count, word = found
        assert (ours.mean, ours.count) == (pytest.approx(mean, rel=1e-6, abs=1e-6), count), row
        assert (
            math.isinf(half)
            and math.isinf(ours.half_width)
            or ours.half_width == pytest.approx(half, rel=1e-6, abs=1e-6)
        )
        both = f"{word} ({RULES[rule]})"
        assert row.verdict == word or both in row.verdict.split("; "), row
        compared_rows += 1
    assert compared_rows >= 40


@pytest.mark.full
def test_claims_words_of_rows_are_their_weights(rows):
    both = {"DB-MTL": 1, "loss-only": -1, "gradient-only": -1, "EW": 1}
    assert said(both) == "DB-MTL - loss-only - gradient-only + EW"
    for row in rows:
        if row.unit == "percent" and row.weights and row.claim not in ("C15", "C17", "C26"):
            words = re.sub(r"best (?:other|of \d+ methods) \((.*?)\)", r"\1", row.quantity)
            is_mean = "mean of" in words or row.claim[0] == "N"
            assert is_mean or said(row.weights) in words, row
        if row.claim == "C15" and row.weights:
            other = row.quantity.split("max - ")[1]
            assert row.weights == {"DB-MTL": 1, f"DB-MTL(alpha={other})": -1}
        if row.claim == "C17":
            beta = re.search("beta=([\\d.]+)(/k)?", row.quantity)
            decay = "" if beta[2] else ", beta_decay=0"
            label = f"DB-MTL(beta={beta[1]}{decay})"
            label = "DB-MTL" if label == "DB-MTL(beta=0.5)" else label
            assert row.weights == {label: 1, "DB-MTL(beta=0)": -1}


# ----------------------------------------------------------------------------------- the quantities


def test_claims_profiles_that_seeds_share():
    table = pd.DataFrame({"a": [1.0, 11.0, 5.0], "b": [2.0, 12.0, 5.0], "c": [3.0, 13.0, 5.0]})
    found = common_profile(table)
    assert found == pytest.approx({(0, 1): 1.0, (0, 2): 0.0, (1, 2): 0.0})
    assert found[0, 1] == pytest.approx(np.cov(table.loc[0], table.loc[1])[0, 1])
    assert common_profile(table[:2]) == {}


def test_claims_shared_profiles_of_noise_are_rarely_a_sign():
    """Three seeds of noise: the interval over pairs misses zero in about one case of twenty."""
    random = np.random.default_rng(0)
    signs = []
    for _ in range(400):
        table = pd.DataFrame(random.normal(size=(12, 3)).T)
        signs.append(estimate(common_profile(table)).sign)
    assert 0.01 < np.mean(np.array(signs) != 0) < 0.12 and np.mean(signs) < 0.1


def watched_run(losses, norms=(), cosines=()):
    """A run of tasks "0", "1", ... with these curves; a look a step, an epoch a loss."""
    count = len(losses[0])
    looks = {"steps": list(range(len((norms or cosines or [[]])[0])))}
    looks["norms"] = {str(task): list(curve) for task, curve in enumerate(norms)}
    looks["cosines"] = {f"{pair}|x": list(curve) for pair, curve in enumerate(cosines)}
    train = {str(task): list(curve) for task, curve in enumerate(losses)}
    return {
        "state": "finished",
        "steps": len(looks["steps"]),
        "curves": {"epochs": list(range(1, count + 1)), "train": train},
        "monitors": looks,
    }


def test_claims_roughness_and_rise_by_hand():
    steady = 5 * 0.8 ** np.arange(9)
    zigzag = np.exp([0, 0.3, 0, 0.3, 0])
    rough = log_mean(of_curve(roughness), ["0", "1"])
    assert rough(watched_run([zigzag, zigzag])) == pytest.approx(math.log(0.6))
    bumpy = watched_run([steady * np.array([1.0, 1.2, 1, 1, 1, 1, 1, 1, 1])] * 2)
    assert log_mean(of_curve(per_descent), ["0", "1"])(bumpy) == pytest.approx(
        rough(bumpy) - math.log(-math.log(0.8))
    )
    line = np.linspace(-0.01, 0.01, 11)
    twice = watched_run([steady], cosines=[line, line])
    assert cosine_measure("rise")(twice) == pytest.approx(0.02)
    assert cosine_measure("last fifth")(twice) == pytest.approx(0.009)
    bent = watched_run([steady], cosines=[line**2])
    assert cosine_measure("rise")(bent) == pytest.approx(0, abs=1e-12)
    assert cosine_measure("share positive")(twice) == pytest.approx(5 / 11)
    late = log_mean(late_norm, ["0"])
    assert late(watched_run([steady], norms=[[9.0, 9, 1, 3]])) == pytest.approx(math.log(2))


@pytest.mark.parametrize("share", [False, True])
def test_claims_rank_correlations_are_spearmans(share):
    """Pearson's correlation of the ranks, by numpy."""
    random = np.random.default_rng(1)
    losses = np.sort(random.uniform(0.1, 2, (5, 4)))[:, ::-1]
    norms = random.uniform(size=(5, 8))
    train, watched = (
        dict(zip("abcde", values.tolist(), strict=True)) for values in (losses, norms)
    )
    record = {
        "config": {"scale": {"epochs": 4}},
        "steps": 8,
        "curves": {"epochs": [1, 2, 3, 4], "train": train},
    }
    record["monitors"] = {"steps": list(range(8)), "norms": watched}
    level = losses / losses[:, :1] if share else np.log(losses)
    expected = []
    for step in range(6):
        fall = level[:, step // 2] - level[:, -1]
        ranks = [np.argsort(np.argsort(values)) for values in (norms[:, step], fall)]
        expected.append(np.corrcoef(*ranks)[0, 1])
    assert still_to_come(record, share) == pytest.approx(np.mean(expected))


@pytest.mark.full
def test_claims_nash_weights_are_judged(places, monkeypatch):
    grams = gramians(places.committed)
    assert all(max(nash_errors(M)) < 1e-9 for M in grams.values()) and len(grams) in (1, 3)
    monkeypatch.setattr(
        claims_computed,
        "NashMTL",
        lambda: lambda M, losses: torch.ones_like(losses, dtype=M.dtype),
    )
    assert all(min(nash_errors(M)) > 0.01 for M in grams.values())


def test_claims_norm_ratios_see_what_is_not_equal():
    assert max(norm_ratios("gradient-only", 0.0, 10)) - 1 < 1e-12
    assert max(norm_ratios("gradient-only", 0.5, 10)) > 1.01
    assert max(norm_ratios("Nash-MTL", None, 10)) > 1.01


def test_claims_costs_are_rows():
    names = [*LOSS_METHODS, *GRADIENT_METHODS, "DB-MTL", "loss-only"]
    slow = {*GRADIENT_METHODS, "DB-MTL"}
    ms = {
        m: {"forward": [1.0, 1.1, 1.2], "backward": [2.0 if m in slow else 1.0] * 3} for m in names
    }
    rows = cost_rows({"benchmark": "nyuv2", "scale": "generated", "ms": ms})
    assert [row.verdict for row in rows] == ["same sign", "same sign", "undecided"]
    assert rows[0].value("best").mean == pytest.approx(
        np.mean(np.log([3 / 2, 3.1 / 2.1, 3.2 / 2.2]))
    )
    assert rows[0].seeds == 3
    assert {row.verdict for row in cost_rows({})} == {"not run"}


# ------------------------------------------------------------------------------------------ picture


@pytest.mark.full
def test_claims_pictures_show_every_number(rows):
    use_style()
    pages = forest_pages(rows)
    shown = [row for page in pages for row in page]
    assert sorted(map(id, shown)) == sorted(id(row) for row in rows if is_drawn(row))
    has_interval = [
        row for row in rows if any(isinstance(value, Interval) for value in row.ours.values())
    ]
    assert len(shown) == len(has_interval)
    for page in pages[:2]:
        figure = forest_figure(page)
        assert len(palette_png(figure)) < 61_440  # -W error: a layout that does not fit is one
        names = [x.get_text() for ax in figure.axes for x in ax.get_yticklabels() if x.get_text()]
        assert len(names) == len(page)
        figure.draw_without_rendering()
        headings = [text.get_text()[:3] for ax in figure.axes for text in ax.texts]
        assert headings == list(dict.fromkeys(row.claim for row in page))
        for ax in figure.axes:
            boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
            assert all(box.x1 < ax.bbox.x0 + 3 and box.x0 > 0 for box in boxes if box.width)
        plt.close(figure)


@pytest.mark.full
def test_claims_table_is_the_rows(rows, places):
    table = table_rows(rows, places)
    assert [line["id"] for line in table] == [row.claim for row in rows]
    assert [line["verdict"] for line in table] == [row.verdict for row in rows]
    assert sum(line["rows"] for line in tally(rows)) == len(rows)


def test_cards_of_the_ledger_call_no_measured_place_not_run():
    card = json.loads((ROOT / "figures/paper/cards/claims_1.json").read_text(encoding="utf-8"))
    sizes = {name: run for name, run in card["runs"].items() if ", " in name}
    assert [name for name, run in sizes.items() if run is None] == []
    own = {name: run for name, run in sizes.items() if name.endswith("own rates")}
    assert own["office31, cpu, own rates"]["seeds"] >= 10
    assert not set(BY_QUESTIONS) & {name.split(", ")[0] for name in own} & set(card["runs"])
