"""The ledger of claims: a row for every claim, verdicts by the rules, and numbers that another
route gives as well."""

import ast
import csv
import itertools
import json
import math
import os
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import scipy.stats
import torch

from dbmtl.benchmarks.base import get_benchmark
from dbmtl.experiments.intervals import Interval
from dbmtl.experiments.method_labels import parse_method
from dbmtl.experiments.records import configuration, run_identity
from dbmtl.report.paper import paper_claims
from dbmtl.report.style import palette_png, use_style

ROOT = Path(__file__).resolve().parents[2]
CELLS = [
    cell
    for cell in nbformat.read(ROOT / "nbs" / "15_paper/17_claims.ipynb", 4).cells
    if cell.cell_type == "code"
]
IDS = [claim["id"] for claim in paper_claims()]
COMPUTED = {"holds numerically", "does not hold", "counted", "open: not an experiment"}
JUDGED = {
    "reproduced",
    "not reproduced",
    "same sign",
    "opposite sign",
    "undecided",
    "one run",
    "none",
    "not run",
}


@pytest.fixture(scope="module")
def page():
    """The notebook's cells on the committed records; nothing is trained and nothing is written."""
    names, folder = {}, os.getcwd()
    os.chdir(ROOT)
    try:
        for cell in CELLS:
            if not re.search(r"\bask\(|artifacts\.(?:table|figure)\(", cell.source):
                exec(compile(cell.source, "15_paper/17_claims", "exec"), names)
    finally:
        os.chdir(folder)
    yield names
    plt.close("all")


def record(benchmark, label, seed, scale, gain=0.0, at_floor=()):
    """Every metric of STL is 10; a gain of g percent moves it by g/10 to its better side."""
    benchmark = get_benchmark(benchmark)
    method, hyper = parse_method(label)
    floors, test = {}, {}
    for task, metrics in benchmark.directions.items():
        signs = {metric: 1 if better == "up" else -1 for metric, better in metrics.items()}
        floors[task] = {metric: 10 - 5 * sign for metric, sign in signs.items()}
        test[task] = (
            dict(floors[task])
            if task in at_floor
            else {m: 10 + s * gain / 10 for m, s in signs.items()}
        )
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
        "selected": {"best epoch": {"test": test}, "average of ten": {"test": test}},
    }


def place(page, name, scale, gains, **options):
    """A place where each method has these improvements over STL, a number a seed."""
    most = max(map(len, gains.values()))
    runs = {"STL": [0.0] * most} | gains
    records = [
        record(page["PLACES"][name], m, s, scale, g, **(options if m == "DB-MTL" else {}))
        for m, values in runs.items()
        for s, g in enumerate(values)
    ]
    return page["make_place"](name, records)


# ------------------------------------------------------------------------------------------ the ids


@pytest.mark.full
def test_claims_have_a_row_each(page):
    assert list(dict.fromkeys(row["id"] for row in page["rows"])) == IDS
    with open(ROOT / "figures" / "claims_table.csv", newline="", encoding="utf-8") as file:
        assert list(dict.fromkeys(row["id"] for row in csv.DictReader(file))) == IDS


def test_claims_are_those_of_the_paper():
    beside = Path(os.environ.get("DBMTL_DATA") or ROOT / "nowhere").parent / "paper" / "claims.csv"
    if not beside.exists():
        pytest.skip("no list of claims beside DBMTL_DATA")
    with open(beside, newline="", encoding="utf-8") as file:
        assert [(row["id"], row["kind"]) for row in csv.DictReader(file)] == [
            (c["id"], c["kind"]) for c in paper_claims()
        ]


def test_claims_rows_say_where_and_how(page):
    for row in page["rows"]:
        assert (
            row["statement"]
            and row["test"]
            and row["benchmark"]
            and row["verdict"] in JUDGED | COMPUTED
        )
        assert (row["scale"] == "-") == (
            row["verdict"] == "not run" or row["benchmark"] in ("computed", "-")
        )
        assert row["scale"] != "smoke" and isinstance(row["ours"], Interval | float | str)
        if isinstance(row["ours"], Interval):
            assert row["seeds"] == row["ours"].count
        if row["scale"] != "paper":
            assert "reproduced" not in row["verdict"]
    assert {row["verdict"] for row in page["rows"] if row["id"] == "C27"} == {
        "open: not an experiment"
    }
    assert {
        row["verdict"] for row in page["rows"] if row["id"] in ("C06", "C10", "C25", "N01")
    } == {"holds numerically"}


def test_claims_of_all_benchmarks_have_a_row_for_each(page):
    def places(claim):
        return {
            row["benchmark"]
            for row in page["rows"]
            if row["id"] == claim and not row["benchmark"].startswith("on ")
        }

    six = {"nyuv2", "nyuv2_segnet", "cityscapes", "qm9", "office31", "officehome"}
    assert places("C01") == six and places("C28") == six
    assert places("C11") == places("C12") == six - {"nyuv2_segnet"}
    assert places("C02") == places("C07") == places("C09") == six - {"nyuv2_segnet", "qm9"}
    assert [
        sum(row["id"] == claim and row["benchmark"] == "nyuv2" for row in page["rows"])
        for claim in ("C13", "C15")
    ] == [7, 12]
    assert sum(row["id"] == "C17" for row in page["rows"]) == 18


# -------------------------------------------------------------------------------- nobody types them


def test_claims_verdicts_are_not_typed():
    """Before the table no text is a verdict, but for derivations, counts and the trial."""
    before = CELLS[: next(i for i, cell in enumerate(CELLS) if "LOOKS = {" in cell.source)]
    assert len(before) > 12
    typed = []
    for cell in before:
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                typed += [word for word in JUDGED | COMPUTED if node.value.strip() == word]
                assert not re.search(
                    "reproduced|same sign|opposite sign|undecided|one run", node.value
                ), node.value
    assert sorted(typed) == [
        "counted",
        "does not hold",
        "holds numerically",
        "none",
    ]  # none: the trial at smoke scale


def test_claims_computed_words_follow_from_numbers(page):
    word = {
        value: page["checked"]("C06", "x", value, 0.5)["verdict"]
        for value in (0.4, 0.5, 0.6, math.nan, math.inf)
    }
    assert list(word.values()) == ["holds numerically"] * 2 + ["does not hold"] * 3
    here = place(page, "nyuv2", "cpu", {"DB-MTL": [1.0]})
    assert page["counted"]("C28", "x", here, "1 of 2")["verdict"] == "counted"
    assert page["counted"]("C28", "x", here, None)["verdict"] == "not run"


# ---------------------------------------------------------------------------------- made-up records

UP, DOWN, MIXED = [2.0, 2.1, 2.2], [-2.0, -2.1, -2.2], [2.0, -2.0, 0.5]


@pytest.mark.parametrize(
    "name, scale, values, word",
    [
        ("nyuv2", "paper", UP, "reproduced"),
        ("nyuv2", "paper", DOWN, "not reproduced"),
        ("nyuv2", "paper", MIXED, "undecided"),
        ("nyuv2", "cpu", UP, "same sign"),
        ("nyuv2", "cpu", DOWN, "opposite sign"),
        ("nyuv2", "gpu", UP, "same sign"),
        ("nyuv2", "paper-scratch", UP, "same sign"),
        ("nyuv2", "paper", UP[:2], "undecided"),
        ("nyuv2", "paper", UP[:1], "one run"),
        ("pacs", "paper", UP, "same sign"),
        ("pacs", "paper", DOWN, "opposite sign"),
        ("nyuv2-sgd", "paper", UP, "same sign"),
        ("nyuv2", "smoke", UP, "none"),
        ("streets", "generated", UP, "same sign"),
    ],
)
def test_claims_verdicts_of_made_up_records(page, name, scale, values, word):
    here = place(page, name, scale, {"DB-MTL": values, "EW": [0.0] * 3})
    row = page["gained"]("C02", here, page["minus"]("DB-MTL", "STL"), 1.15)
    assert row["verdict"] == word and row["seeds"] == len(values) and row["scale"] == scale
    assert row["benchmark"] == (name if name == "nyuv2" else f"on {name}") and row[
        "ours"
    ].mean == pytest.approx(np.mean(values))
    opposite = {"reproduced": "not reproduced", "same sign": "opposite sign"}
    turned = page["gained"]("C02", here, page["minus"]("STL", "DB-MTL"), 1.15)["verdict"]
    assert turned == (opposite | {b: a for a, b in opposite.items()}).get(word, word)


def test_claims_verdicts_need_runs_floors_and_all_methods(page):
    good = place(page, "nyuv2", "paper", {"DB-MTL": UP})
    weights = page["minus"]("DB-MTL", "STL")
    assert page["gained"]("C02", good, weights, 1.0, whole=False)["verdict"] == "same sign"
    assert page["gained"]("C02", good, page["minus"]("DB-MTL", "EW"), 1.0)["verdict"] == "not run"
    floored = place(page, "nyuv2", "paper", {"DB-MTL": UP}, at_floor=["depth"])
    row = page["gained"]("C02", floored, weights, 1.0)
    assert row["verdict"] == "none" and "depth" in row["ours"]
    empty = page["make_place"]("nyuv2", [])
    row = page["gained"]("C02", empty, weights, 1.0)
    assert row["verdict"] == "not run" and (row["scale"], row["seeds"]) == ("-", 0)
    one = page["gained"]("C21", page["make_place"]("nyuv2 (MTAN)", []), weights, 1.0)
    assert one["benchmark"] == "nyuv2 (MTAN)"


def test_claims_against_stl_know_the_spread_of_stl(page):
    """STL's own runs count: each is the baseline of the method's run of its seed."""
    runs = [record("nyuv2", "STL", s, "cpu", g) for s, g in enumerate((-30.0, 0.0, 30.0))]
    runs += [record("nyuv2", "DB-MTL", s, "cpu", 2.0) for s in range(3)]
    row = page["gained"](
        "C02", page["make_place"]("nyuv2", runs), page["minus"]("DB-MTL", "STL"), 1.0
    )
    assert (
        row["verdict"] == "undecided" and 0 < row["ours"].mean < 15 and row["ours"].half_width > 50
    )


def test_claims_are_held_against_the_sign_in_print(page):
    here = place(page, "office31", "cpu", {"DB-MTL": DOWN, "DB-MTL(beta=0)": [0.0, 0.1, 0.0]})
    weights = page["minus"]("DB-MTL", "DB-MTL(beta=0)")
    assert [
        page["gained"]("C17", here, weights, paper)["verdict"] for paper in (0.3, -0.3, None)
    ] == ["opposite sign", "same sign", "opposite sign"]
    assert page["gained"]("C17", here, weights, sign=-1)["verdict"] == "same sign"


def test_claims_are_read_at_the_best_scale_that_has_them(page, monkeypatch):
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
    runs.append(
        record("qm9", "UW", 0, "cpu")
        | {"config": record("qm9", "UW", 0, "cpu")["config"] | {"protocol": 0}}
    )
    runs.append(record("qm9", "DB-MTL(beta=0.1)", 0, "cpu"))
    monkeypatch.setitem(page, "committed", runs)
    place_of = page["place_of"].__wrapped__
    assert place_of("qm9").scale == "cpu" and list(place_of("qm9").groups) == [
        "STL",
        "EW",
        "DB-MTL",
    ]
    assert place_of("qm9", ("PCGrad", "EW")).scale == "early"
    assert (
        place_of("qm9", ("DB-MTL(beta=0.1)",)).scale == "cpu"
        and "DB-MTL" not in place_of("qm9", ("DB-MTL(beta=0.1)",)).groups
    )
    assert place_of("qm9", ("CAGrad", "EW")).scale == "cpu"
    assert (place_of("cityscapes").scale, place_of("streets").scale, place_of("pacs").scale) == (
        "-",
        "generated",
        "-",
    )


# ------------------------------------------------------------------------------------ another route

BENCHMARKS = {
    "nyuv2_segnet": "nyuv2-segnet",
    "nyuv2 (Cross-stitch)": "nyuv2-cross-stitch",
    "nyuv2 (MTAN)": "nyuv2-mtan",
    "streets": "cityscapes",
}


def weights_of(test):
    """{label: factor} from the words of a row, or None where it is another kind of row."""
    found = re.fullmatch(r"(?:delta_p(?:, \w+)?|segmentation|depth|normal): (.*?)(?:; .*)?", test)
    if not found or "mean of" in test or "variance" in test:
        return None
    words = re.sub(r"best (?:other|of \d+ methods) \((.*?)\)(?= - |$)", r"\1", found[1])
    pieces = re.split(r" ([-+]) ", words)
    signs = [1, *(1 if sign == "+" else -1 for sign in pieces[1::2])]
    return {label_of(words, piece): sign for piece, sign in zip(pieces[::2], signs, strict=True)}


def label_of(words, piece):
    """Labels of runs for beta=0.1/k^0.5, beta=0.1 and, in a row about lengths, max and 0.01."""
    if piece.startswith("beta="):
        value = piece.removeprefix("beta=").removesuffix("/k^0.5")
        decays = piece.endswith("/k^0.5")
        if value == "0.5" and decays:
            return "DB-MTL"
        if decays or value == "0":
            return f"DB-MTL(beta={value})"
        return f"DB-MTL(beta={value}, beta_decay=0)"
    if words.startswith("max - "):
        return "DB-MTL" if piece == "max" else f"DB-MTL(alpha={piece})"
    return piece


def runs_of(records, benchmark, scale, label):
    method, hyper = parse_method(label)
    wanted = {"benchmark": benchmark, "method": method, "hyper": hyper}
    done = [
        r for r in records if r["state"] == "finished" and r["config"]["scale"]["name"] == scale
    ]
    return {
        r["config"]["seed"]: r
        for r in done
        if all(r["config"][key] == value for key, value in wanted.items())
    }


def metrics_of(record):
    """[metrics] signed so that more is better, their floors, and the task of each."""
    test = next(
        chosen["test"] for label, chosen in record["selected"].items() if label.startswith("best")
    )
    names = [(t, m) for t, metrics in record["directions"].items() for m in metrics]
    signs = np.array([1 if record["directions"][t][m] == "up" else -1 for t, m in names])
    return (
        (np.array([source[t][m] for t, m in names]) for source in (test, record["floors"]["test"])),
        signs,
        [t for t, _ in names],
    )


def other_route(records, row):
    """Mean, half width, seeds and verdict of a row, from the records; None without a number."""
    weights = weights_of(row["test"])
    name = row["benchmark"].removeprefix("on ")
    benchmark = BENCHMARKS.get(name, name)
    only = row["test"].split(":")[0]
    runs = {label: runs_of(records, benchmark, row["scale"], label) for label in {*weights, "STL"}}
    if not all(runs.values()):
        return None
    values = {}
    for label, found in runs.items():
        for seed, one in found.items():
            (test, floor), signs, tasks = metrics_of(one)
            counted = np.array([t == only if only in tasks else True for t in tasks])
            better = signs * (test - floor) / np.abs(floor)
            if any(
                better[[t == task for t in tasks]].mean() <= 0.05
                for task in {t for t, c in zip(tasks, counted, strict=True) if c}
            ):
                return None
            values.setdefault(label, {})[seed] = test
    base = values["STL"]  # the run of the same seed
    shares = np.array([1 / tasks.count(t) * c for t, c in zip(tasks, counted, strict=True)]) / len(
        {t for t, c in zip(tasks, counted, strict=True) if c}
    )
    gain = {
        label: {
            s: float(shares @ (100 * signs * (v - base[s]) / base[s]))
            for s, v in found.items()
            if s in base
        }
        for label, found in values.items()
    }
    seeds = [s for s in range(20) if all(s in gain[label] for label in weights)]
    each = [sum(w * gain[label][s] for label, w in weights.items()) for s in seeds]
    half = (
        scipy.stats.t.ppf(0.975, len(each) - 1) * np.std(each, ddof=1) / np.sqrt(len(each))
        if len(each) > 1
        else math.inf
    )
    mean = float(np.mean(each))
    own = not row["benchmark"].startswith("on ")
    paper = re.match(r"-?[\d.]+(e-\d+)?", str(row["paper"]))
    sign = np.sign(float(paper[0])) if paper else 1
    if len(each) < 3 or abs(mean) <= half:
        return mean, half, len(each), "one run" if len(each) == 1 else "undecided"
    same = np.sign(mean) == sign
    if row["scale"] == "paper" and own:
        return mean, half, len(each), "reproduced" if same else "not reproduced"
    return mean, half, len(each), "same sign" if same else "opposite sign"


def test_claims_rows_are_what_the_files_say(page):
    records, compared = [json.loads(json.dumps(record)) for record in page["committed"]], 0
    for row in page["rows"]:
        foreign = row["id"] == "C12" and row["benchmark"].startswith(
            "on "
        )  # held against another benchmark's sign
        if weights_of(row["test"]) is None or row["verdict"] == "counted" or foreign:
            continue
        found = other_route(records, row) if row["scale"] != "-" else None
        if found is None:
            assert row["verdict"] in ("none", "not run") and isinstance(row["ours"], str), row
            continue
        mean, half, count, word = found
        ours = row["ours"]
        assert (ours.mean, ours.count) == (pytest.approx(mean, rel=1e-6, abs=1e-6), count), row
        assert (
            math.isinf(half)
            and math.isinf(ours.half_width)
            or ours.half_width == pytest.approx(half, rel=1e-6, abs=1e-6)
        )
        assert row["verdict"] == word, row
        compared += 1
    assert compared >= 40


def test_claims_words_of_rows_are_read(page):
    assert weights_of("delta_p: DB-MTL - best other (Nash-MTL); rank 2 of 11; 20 others") == {
        "DB-MTL": 1,
        "Nash-MTL": -1,
    }
    assert weights_of("delta_p: best of 2 methods (DB-MTL) - STL") == {"DB-MTL": 1, "STL": -1}
    assert weights_of("delta_p, SGD: max - 1/T") == {"DB-MTL": 1, "DB-MTL(alpha=1/T)": -1}
    assert weights_of("delta_p: beta=0.5/k^0.5 - beta=0") == {"DB-MTL": 1, "DB-MTL(beta=0)": -1}
    assert weights_of("delta_p: beta=0.5 - beta=0") == {
        "DB-MTL(beta=0.5, beta_decay=0)": 1,
        "DB-MTL(beta=0)": -1,
    }
    both = weights_of("delta_p: DB-MTL - loss-only - gradient-only + EW")
    assert both == {"DB-MTL": 1, "loss-only": -1, "gradient-only": -1, "EW": 1}


# ----------------------------------------------------------------------------------- the quantities


def test_claims_profiles_that_seeds_share(page):
    values = {
        "a": {0: 1.0, 1: 11.0, 2: 5.0},
        "b": {0: 2.0, 1: 12.0, 2: 5.0},
        "c": {0: 3.0, 1: 13.0, 2: 5.0},
    }
    found = page["common_profile"](values)["a"]
    assert found == pytest.approx({(0, 1): 1.0, (0, 2): 0.0, (1, 2): 0.0})
    covariance = np.cov([[v[0] for v in values.values()], [v[1] for v in values.values()]])[0, 1]
    assert found[0, 1] == pytest.approx(covariance)
    assert page["common_profile"]({m: {0: 1.0, 1: 2.0} for m in "abc"}) == {}


def test_claims_shared_profiles_of_noise_are_rarely_a_sign(page):
    """Three seeds of noise: the interval over pairs misses zero in about one case of twenty."""
    random = np.random.default_rng(0)
    signs = []
    for _ in range(400):
        values = {m: dict(enumerate(random.normal(size=3))) for m in range(12)}
        signs.append(page["estimate"](page["common_profile"](values)[0]).sign)
    assert 0.01 < np.mean(np.array(signs) != 0) < 0.12 and np.mean(signs) < 0.1


def test_claims_roughness_and_rise_by_hand(page):
    steady = torch.tensor(5 * 0.8 ** np.arange(9))
    zigzag = torch.tensor(np.exp([0, 0.3, 0, 0.3, 0]))
    assert page["roughness"]([zigzag, zigzag]).item() == pytest.approx(math.log(0.6))
    bumpy = steady * torch.tensor([1.0, 1.2, 1, 1, 1, 1, 1, 1, 1])
    assert page["roughness"]([bumpy], per_descent=True).item() == pytest.approx(
        page["roughness"]([bumpy]).item() - math.log(-math.log(0.8))
    )
    line = torch.linspace(-0.01, 0.01, 11, dtype=torch.float64)
    assert page["rise"]([line, line]).item() == pytest.approx(0.02) and page["fifth"](
        [line]
    ).item() == pytest.approx(0.009)
    assert page["rise"]([line**2]).item() == pytest.approx(0, abs=1e-12)
    assert page["positive"]([line]).item() == pytest.approx(5 / 11 - 0.5)
    assert page["late_norm"]([torch.tensor([9.0, 9, 1, 3])]).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("share", [False, True])
def test_claims_rank_correlations_are_spearmans(page, share):
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
    expected = [
        scipy.stats.spearmanr(norms[:, step], level[:, step // 2] - level[:, -1]).statistic
        for step in range(6)
    ]
    assert page["still_to_come"](record, share) == pytest.approx(np.mean(expected))


def test_claims_nash_weights_are_judged(page, monkeypatch):
    grams = dict(page["gramians"]())
    assert all(max(page["nash_errors"](M)) < 1e-9 for M in grams.values()) and len(grams) in (1, 3)
    monkeypatch.setitem(
        page, "NashMTL", lambda: lambda M, losses: torch.ones_like(losses, dtype=M.dtype)
    )
    assert all(min(page["nash_errors"](M)) > 0.01 for M in grams.values())


def test_claims_norm_ratios_see_what_is_not_equal(page):
    assert max(page["norm_ratios"]("gradient-only", 0.0, 10)) - 1 < 1e-12
    assert (
        max(page["norm_ratios"]("gradient-only", 0.5, 10)) > 1.01
        and max(page["norm_ratios"]("Nash-MTL", None, 10)) > 1.01
    )


def test_claims_costs_are_rows(page):
    names = [*page["LOSS_METHODS"], *page["GRADIENT_METHODS"], "DB-MTL", "loss-only"]
    slow = {*page["GRADIENT_METHODS"], "DB-MTL"}
    ms = {
        m: {"forward": [1.0, 1.1, 1.2], "backward": [2.0 if m in slow else 1.0] * 3} for m in names
    }
    rows = {
        row["test"]: row
        for row in page["costs"]({"benchmark": "nyuv2", "scale": "generated", "ms": ms})
    }
    assert [row["verdict"] for row in rows.values()] == ["same sign", "same sign", "undecided"]
    first = next(iter(rows.values()))
    assert (
        first["ours"].mean == pytest.approx(np.mean(np.log([3 / 2, 3.1 / 2.1, 3.2 / 2.2])))
        and first["seeds"] == 3
    )
    assert {row["verdict"] for row in page["costs"]({})} == {"not run"}


# ------------------------------------------------------------------------------------------ picture


def test_claims_picture_has_a_look_for_every_word(page):
    looks = page["LOOKS"]
    assert set(looks) == JUDGED | COMPUTED and len(set(looks.values())) == len(looks)
    assert len({look.split()[1] for look in looks.values()}) == len(looks)  # not by color alone


def test_claims_picture_shows_all_rows(page):
    use_style()
    words = itertools.cycle([*page["LOOKS"]])
    rows = [row | {"verdict": next(words)} for row in page["rows"]]
    cells, columns = page["cells_of"](rows)
    assert sum(sum(cell.values()) for cell in cells.values()) == len(rows)
    assert len(columns) == len(set(columns)) and {claim for claim, _ in cells} == set(IDS)
    figure = page["draw"](rows)
    assert len(palette_png(figure)) < 60_000  # -W error: a layout that does not fit is a warning
    (ax,) = figure.axes
    assert len(ax.patches) == sum(map(len, cells.values())) and len(
        figure.legends[0].get_texts()
    ) == len(page["LOOKS"])
    labels = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert all(box.x1 < ax.bbox.x0 + 3 and box.x0 > 0 for box in labels)
