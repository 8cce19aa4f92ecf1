"""Sweeps of one setting: labels, levels, differences, ranges, and whether the setting matters."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from helpers.made_up import page

from dbmtl.experiments.method_labels import parse_method
from dbmtl.registry import recipe
from dbmtl.report.paper import paper_figure
from dbmtl.report.results_page import open_page
from dbmtl.report.settings import (
    Sweep,
    alpha_label,
    axis_figure,
    beta_label,
    final_losses,
    magnitude_in_words,
    magnitude_row,
    place_in_words,
    range_in_words,
    range_row,
    spread_by_chance,
    sweep_figure,
)

BETAS = [point["x"].removeprefix("beta=") for point in paper_figure(5)]
ALPHAS = [point["x"].removeprefix("alpha=") for point in paper_figure(6)]


def sweep(gains, label_of, values, figure, reference, benchmark="office31"):
    """`gains`: {value: gains of the seeds}."""
    names = {label_of(value): value for value in values}
    printed = {
        label_of(x): point["value"] for x, point in zip(values, paper_figure(figure), strict=True)
    }
    runs = {label_of(value): seeds for value, seeds in gains.items()}
    if runs:
        shown = page(benchmark, runs)
    else:
        shown = open_page("15_paper/11_figure5_beta", "officehome", methods=list(names))
    return Sweep(shown, benchmark, names, printed, label_of(reference))


def beta_gains():
    """A rate that fades gains more than none, a constant one less."""
    shift = {value: 1 if "/k" in value else -1 for value in BETAS} | {"0": 0}
    return {
        value: [2 + 0.1 * seed + shift[value] * (0.9 + 0.1 * seed) for seed in range(3)]
        for value in BETAS
    }


def alpha_gains(ends, maximum):
    """The ends of the constants, and the maximum, apart from all others."""
    gains = {value: [5.0, 5.1, 5.2] for value in ALPHAS}
    for value in ("0.01", "10"):
        gains[value] = [x + ends for x in gains[value]]
    gains["max"] = [x + maximum for x in gains["max"]]
    return gains


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def test_settings_betas_are_the_nineteen_of_the_paper():
    labels = [beta_label(value) for value in BETAS]
    assert len(set(labels)) == 19 and labels[0] == "DB-MTL(beta=0)" and "DB-MTL" in labels
    for value, label in zip(BETAS, labels, strict=True):
        method, hyper = parse_method(label)
        ema = recipe(method, 3, **hyper).ema
        assert (ema is None) == (value == "0")
        if ema is not None:
            beta, _, decay = value.partition("/k^")
            assert (ema.beta, ema.beta_decay) == (float(beta), float(decay or 0))


def test_settings_alphas_are_the_twelve_of_the_paper():
    labels = [alpha_label(value) for value in ALPHAS]
    assert len(set(labels)) == 12
    for value, label in zip(ALPHAS, labels, strict=True):
        method, hyper = parse_method(label)
        alpha = recipe(method, 3, **hyper).aggregator.alpha
        is_number = value[0].isdigit() and "/" not in value
        assert alpha == (float(value) if is_number else value)


def test_settings_both_halves_of_c17_are_counted_and_tested_once():
    figure5 = sweep(beta_gains(), beta_label, BETAS, 5, "0")
    fading = [label for label, value in figure5.names.items() if "/k" in value]
    constant = [x for x in figure5.others if x not in fading and figure5.names[x] != "0.1"]
    halves = [range_row(figure5, "fading", fading), range_row(figure5, "constant", constant)]
    assert [row["values"] for row in halves] == [9, 8]
    assert [row["one by one"][:11] for row in halves] == ["9 same sign", "8 same sign"]
    means = [row["average: ours, best epoch"].mean for row in halves]
    assert means == pytest.approx([1, -1])
    assert range_in_words(halves[0]).startswith("fading: one by one 9 same sign; 9 of 9 told apart")
    words = {row["difference"]: row["in short"] for row in figure5.differences()}
    assert len(words) == 18 and set(words.values()) == {"same sign"}


def test_settings_rows_and_csv_hold_ours_and_the_papers():
    figure5 = sweep(beta_gains(), beta_label, BETAS, 5, "0")
    rows = figure5.rows()
    assert [row["setting"] for row in rows] == BETAS
    assert rows[1]["delta_p, best epoch"].mean == pytest.approx(3.1)
    assert "minus reference: verdict" not in rows[0]
    drawn = figure5.csv_rows()
    paper = drawn[drawn["series"] == "paper"]
    assert list(paper["value"]) == [point["value"] for point in paper_figure(5)]
    assert len(drawn) == 19 * 3 * 2 + 19
    differences = figure5.frame(against=figure5.reference)
    at_fading = differences[differences["row"] == beta_label("0.1/k^0.5")]["value"]
    assert list(at_fading) == pytest.approx([0.9, 1.0, 1.1] * 2)


def test_settings_magnitude_under_two_optimizers():
    """One of them moved by nothing, the other by the ends."""
    flat = sweep(alpha_gains(0, -1), alpha_label, ALPHAS, 6, "max")
    moved = sweep(alpha_gains(-2, 1), alpha_label, ALPHAS, 6, "max")
    constants = [alpha_label(x) for x in ALPHAS if x[0].isdigit()]
    ends = [alpha_label("0.01"), alpha_label("10")]
    row = magnitude_row(flat, constants, ends)
    assert row["ends minus between: ours, best epoch"].mean == pytest.approx(0)
    assert row["spread, best epoch"] == pytest.approx(0)
    assert row["as much by chance, best epoch"] == 1
    row = magnitude_row(moved, constants, ends)
    assert row["ends minus between: ours, best epoch"].mean == pytest.approx(-2)
    assert row["ends minus between: verdict"].startswith("same sign")
    assert row["as much by chance, best epoch"] < 0.05
    assert place_in_words(flat).startswith("12 of 12") and place_in_words(moved).startswith("1 of")


def test_settings_that_were_not_run_say_so():
    nothing = sweep({}, alpha_label, ALPHAS, 6, "max")
    assert not nothing.has_runs and place_in_words(nothing) == "not run"
    constants = [alpha_label(x) for x in ALPHAS if x[0].isdigit()]
    row = magnitude_row(nothing, constants, constants[:1])
    assert magnitude_in_words(row).endswith("not run.")
    assert final_losses(nothing.page, list(nothing.names)) == {}
    assert {row["minus reference: verdict"] for row in nothing.rows()[:9]} == {"not run"}
    with pytest.raises(ValueError, match="nothing to draw"):
        axis_figure([nothing], dict.fromkeys(constants, 1.0), "alpha")


def test_settings_figures_have_no_empty_panel():
    ran = sweep(alpha_gains(-2, 1), alpha_label, ALPHAS, 6, "max")
    nothing = sweep({}, alpha_label, ALPHAS, 6, "max")
    left, right = sweep_figure([ran, nothing], "length", "minus maximum").axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == ALPHAS
    assert right.get_xlabel() == "minus maximum, points"
    alone = sweep_figure([nothing], "length", "minus maximum")
    assert "ours not run" in alone.axes[0].get_title(loc="left")
    values = {alpha_label(x): float(x) for x in ("0.01", "1", "10")}
    assert len(axis_figure([ran, nothing], values, "alpha").axes) == 1


def test_settings_spread_needs_seeds():
    table = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    assert spread_by_chance(table)[0] == pytest.approx(2)
    assert spread_by_chance(table[:1]) == (None, None)
    assert spread_by_chance(table[["a"]]) == (None, None)
