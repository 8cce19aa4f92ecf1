"""The printed numbers: their shape, and every printed delta_p of Tables 1-4 and 6 recomputed."""

import math

import pytest

from dbmtl.experiments.metrics import delta_m, delta_p, delta_p_per_task
from dbmtl.report.ablation import DIFFERENCES
from dbmtl.report.paper import (
    TABLES,
    Printed,
    Recomputed,
    half_unit,
    paper_ablation,
    paper_averages,
    paper_claims,
    paper_directions,
    paper_figure,
    paper_half_units,
    paper_sources,
    paper_summary,
    paper_table,
    paper_task_gains,
    printed_interval,
    recompute_delta_p,
)
from dbmtl.report.style import ALIASES, COLORS

METRICS = {
    "nyuv2": 9,
    "cityscapes": 4,
    "qm9": 11,
    "office31": 3,
    "officehome": 4,
    "nyuv2_segnet": 9,
}


@pytest.mark.parametrize("benchmark", TABLES)
def test_paper_table_is_complete(benchmark):
    table = paper_table(benchmark)
    directions = paper_directions(benchmark)
    halves = paper_half_units(benchmark)
    assert list(table)[0] == "STL" and list(table)[-1] == "DB-MTL" and len(table) == 22
    assert sum(map(len, directions.values())) == METRICS[benchmark]
    for method, tasks in table.items():
        assert {t: set(m) for t, m in tasks.items()} == {t: set(m) for t, m in directions.items()}
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                half = halves[method][task][metric]
                assert value > 0 and value / (2 * half) == pytest.approx(round(value / (2 * half)))
    assert set(table) <= set(COLORS)


def test_paper_numbers_spot_checked():
    assert paper_table("nyuv2")["STL"]["depth"] == {"AErr": 0.3926, "RErr": 0.1605}
    assert paper_table("cityscapes")["STL"]["depth"] == {"AErr": 0.01282, "RErr": 43.53}
    assert paper_table("qm9")["IMTL-G"]["U0"] == {"MAE": 1109.0}
    assert paper_table("officehome")["STL"]["real_world"] == {"accuracy": 80.0}
    assert paper_summary("cityscapes")["DB-MTL"].std == 0.4
    assert paper_directions("nyuv2")["normal"] == {
        "Mean": "down",
        "Median": "down",
        "W11.25": "up",
        "W22.5": "up",
        "W30": "up",
    }


HALVES = {"0.0128": 5e-5, "53.5": 0.05, "-1250": 0.5, "0": 0.5, "65.00": 0.005}


@pytest.mark.parametrize(("text", "half"), HALVES.items())
def test_half_unit(text, half):
    assert half_unit(text) == pytest.approx(half)


def test_every_printed_delta_p_recomputed_but_three_rows():
    outside, rows = {}, 0
    for benchmark in TABLES:
        for method, row in recompute_delta_p(benchmark).items():
            rows += 1
            # an independent route to the same verdict, from the bounds alone
            if (
                max(row.low, row.printed - row.half_unit)
                > min(row.high, row.printed + row.half_unit) + 1e-9
            ):
                outside[benchmark, method] = row.outside
            else:
                assert row.outside == 0
            assert row.low < row.value < row.high
    assert rows == 124
    assert outside == {
        ("officehome", "IMTL-G"): pytest.approx(0.304, abs=0.001),
        ("officehome", "CAGrad"): pytest.approx(0.031, abs=0.001),
        ("office31", "GLS"): pytest.approx(0.001, abs=0.0006),
    }


@pytest.mark.parametrize(
    ("benchmark", "method", "value"),
    [
        ("cityscapes", "GLS", -0.46),
        ("cityscapes", "MGDA", -0.28),
        ("cityscapes", "Aligned-MTL", -0.35),
        ("cityscapes", "MTAdam", -2.64),
        ("cityscapes", "IMTL", -0.26),
        ("cityscapes", "DB-MTL", 0.12),
        ("officehome", "IMTL-G", -1.51),
        ("officehome", "CAGrad", -1.64),
    ],
)
def test_recomputed_delta_p_by_pencil(benchmark, method, value):
    assert recompute_delta_p(benchmark)[method].value == pytest.approx(value, abs=0.006)


def test_recomputed_delta_p_would_notice_a_changed_digit():
    row = recompute_delta_p("nyuv2")["DB-MTL"]
    assert row.outside == 0
    assert row._replace(printed=1.51).outside == pytest.approx(1.505 - row.high)
    assert row._replace(printed=0.75).outside == pytest.approx(row.low - 0.755)
    assert Recomputed(0.1, 0.05, 0.2, 0.15, 0.25).outside == 0  # touching


def test_cityscapes_digits_cannot_decide_the_gain_of_dbmtl():
    row = recompute_delta_p("cityscapes")["DB-MTL"]
    assert row.low < 0.01 and row.high > 0.24 and row.printed == 0.2


def test_nyuv2_dbmtl_per_task_and_metric_average():
    for benchmark, first, second in (
        ("nyuv2", 0.56, ("STL", 0.0)),
        ("nyuv2_segnet", 5.36, ("Aligned-MTL", 4.77)),
    ):
        table = paper_table(benchmark)
        ways = paper_directions(benchmark)
        average = {m: -delta_m(results, table["STL"], ways) for m, results in table.items()}
        ranking = sorted(average, key=average.get, reverse=True)
        assert ranking[:2] == ["DB-MTL", second[0]]
        assert average["DB-MTL"] == pytest.approx(first, abs=0.006)
        assert average[second[0]] == pytest.approx(second[1], abs=0.006)
    table = paper_table("nyuv2")
    ways = paper_directions("nyuv2")
    parts = delta_p_per_task(table["DB-MTL"], table["STL"], ways)
    assert [round(parts[t], 2) for t in ("segmentation", "depth", "normal")] == [0.53, 3.51, -0.61]


def test_qm9_dbmtl_deficit_is_mostly_r2():
    parts = paper_task_gains("qm9")["DB-MTL"]
    assert parts["R2"] == pytest.approx(-359.2, abs=0.05)
    assert parts["R2"] / sum(parts.values()) == pytest.approx(0.56, abs=0.005)


@pytest.mark.parametrize("benchmark", TABLES)
def test_paper_task_gains_are_delta_p_task_by_task(benchmark):
    table = paper_table(benchmark)
    directions = paper_directions(benchmark)
    for method, gains in paper_task_gains(benchmark).items():
        assert gains == delta_p_per_task(table[method], table["STL"], directions)


def test_paper_averages_have_the_halves_where_table_5_has_them():
    averages = paper_averages("qm9")
    assert averages["loss-only"].value == -74.4 and averages["gradient-only"].value == -65.73
    assert {"loss-only", "gradient-only"}.isdisjoint(paper_averages("nyuv2_segnet"))
    assert paper_averages("qm9")["DB-MTL"] == paper_summary("qm9")["DB-MTL"]


@pytest.mark.parametrize("benchmark", ["nyuv2", "cityscapes", "qm9", "office31", "officehome"])
def test_paper_ablation_agrees_with_the_main_tables(benchmark):
    ablation = paper_ablation(benchmark)
    printed = paper_summary(benchmark)
    assert list(ablation) == ["EW", "loss only", "gradient only", "DB-MTL"]
    for method in ("EW", "DB-MTL"):
        assert ablation[method][::2] == printed[method][::2]


def test_paper_sources_and_reruns():
    sources = paper_sources("nyuv2_segnet")
    assert (
        sum(source == "paper" for source in sources.values()) == 7
        and sources["STL"] == "Nash-MTL paper"
    )
    stl = paper_table("nyuv2_segnet")["STL"]
    ways = paper_directions("nyuv2_segnet")
    again = paper_table("nyuv2_segnet", "LibMTL re-run, 3 seeds")
    assert delta_p(again["EW"], stl, ways) == pytest.approx(3.02, abs=0.006)
    assert delta_p(again["GradNorm"], stl, ways) == pytest.approx(7.63, abs=0.006)


def test_nash_mtl_paper_delta_m_of_its_own_tables():
    for benchmark in ("cityscapes", "qm9"):
        table = paper_table(benchmark, "Nash-MTL paper")
        ways = paper_directions(benchmark)
        printed = paper_summary(benchmark, "delta_m", "Nash-MTL paper")
        for method in ("Nash-MTL", "IMTL-G"):
            found = delta_m(table[method], table["STL"], ways)
            assert found == pytest.approx(printed[method].value, abs=1.5)


def test_paper_summary_leaves_out_what_is_not_printed():
    assert "MoCo" not in paper_summary("office31") and "MoCo" in paper_summary(
        "office31", "average_accuracy"
    )
    assert paper_summary("nyuv2")["STL"] == Printed(0.0, 0.05, None)


def test_paper_figures():
    points = [point for number in range(1, 8) for point in paper_figure(number)]
    assert len(points) == 98 and all(isinstance(point["value"], float) for point in points)
    assert {point["method"] for point in points} - {*COLORS, *ALIASES} == {"log"}
    assert max(paper_figure(7), key=lambda point: point["value"])["method"] == "Nash-MTL"


def test_paper_claims():
    claims = paper_claims()
    assert [claim["id"] for claim in claims] == [f"C{n:02}" for n in range(1, 29)] + [
        f"N{n:02}" for n in range(1, 5)
    ]
    assert {claim["kind"] for claim in claims} == {
        "claim",
        "finding",
        "hypothesis",
        "question",
        "critique",
    }
    assert all(claim["statement"] and claim["benchmark"] and claim["test"] for claim in claims)
    claims[0]["id"] = "changed"
    assert paper_claims()[0]["id"] == "C01"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paper_table("qm8"), "got 'qm8'; did you mean 'qm9'?"),
        (lambda: paper_table("qm9", "Nash paper"), "did you mean 'Nash-MTL paper'?"),
        (lambda: paper_summary("qm9", "delta"), "did you mean 'delta_p'?"),
        (lambda: paper_summary("nyuv2", "delta_p", "LibMTL re-run, 1 seed"), "'nothing printed'"),
        (lambda: paper_ablation("nyuv2_segnet"), "did you mean 'nyuv2'?"),
        (lambda: paper_figure(8), "number must be one of"),
    ],
)
def test_paper_names_what_is_unknown(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_printed_interval_of_one_value():
    alone = printed_interval({"EW": Printed(1.0, 0.005, 0.3)}, {"EW": 1})
    assert alone.half_width == pytest.approx(4.302653 * 0.3 / math.sqrt(3), rel=1e-6)
    assert (alone.mean, alone.count) == (1.0, 3)
    assert printed_interval({"EW": Printed(1.0, 0.005, None)}, {"EW": 1}).half_width == 0


def test_printed_deviations_add_in_squares():
    levels = {"EW": -3.0, "loss-only": 1.0, "gradient-only": 2.0, "DB-MTL": 6.0}
    printed = {method: Printed(level, 0.05, 3.0) for method, level in levels.items()}
    interaction = printed_interval(printed, DIFFERENCES["interaction"])
    assert interaction.mean == 6 - 1 - 2 - 3
    assert interaction.half_width == pytest.approx(4.302653 * math.sqrt(4 * 9 / 3), rel=1e-6)
    printed["EW"] = Printed(-3.0, 0.05, None)
    assert printed_interval(printed, {"EW": -1, "DB-MTL": 1}).half_width == 0
    assert printed_interval(printed, {"EW": -1, "MGDA": 1}) is None
