"""The front of two tasks, and the gains that it is drawn from."""

import pandas as pd
import pytest
from helpers.records import last_ten, records_of_toy_question
from hypothesis import given
from hypothesis import strategies as st

from dbmtl.experiments.metrics import delta_p
from dbmtl.experiments.questions import Arm, Question
from dbmtl.report.answers import findings_of
from dbmtl.report.trade_offs import front_of, trade_offs

numbers = st.integers(-3, 3)  # few values, so that there are ties
point_lists = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8)


def dominates(first: tuple, second: tuple) -> bool:
    return first[0] >= second[0] and first[1] >= second[1] and first != second


@given(point_lists)
def test_the_front_is_what_no_point_dominates(points):
    means = pd.DataFrame(points, columns=["x", "y"])
    expected = [
        place
        for place, point in enumerate(points)
        if not any(dominates(other, point) for other in points)
    ]
    assert front_of(means) == expected


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    question = Question(
        name="toy",
        title="What do weights trade?",
        why="A test.",
        benchmark="toy",
        scale="smoke",
        arms=(Arm("EW"), Arm("DB-MTL"), Arm("LS(weights=[0.2, 1.0, 1.8])")),
        pairs=(("DB-MTL", "EW"),),
        effect=1.0,
        deviation=0.5,
        seeds=(100, 101),
        baseline="EW",
        minutes=0.1,
    )
    records = records_of_toy_question(question, tmp_path_factory.mktemp("runs"))
    return findings_of(question, records)


def test_gains_are_delta_p_of_a_task_alone(findings):
    points = trade_offs(findings, ("unit", "small"))
    directions = findings.fresh[0]["directions"]
    assert len(points) == 3 * 2
    for _, point in points.iterrows():
        ours = last_ten(findings.fresh, point["arm"].split("(")[0], point["seed"])
        base = last_ten(findings.fresh, "EW", point["seed"])
        for task in ("unit", "small"):
            alone = delta_p({task: ours[task]}, {task: base[task]}, {task: directions[task]})
            assert point[task] == pytest.approx(alone, abs=1e-9)


def test_more_than_two_tasks_must_be_chosen_from(findings):
    with pytest.raises(ValueError, match=r"between two tasks, got \['unit', 'large', 'small'\]"):
        trade_offs(findings)


def test_an_arm_that_left_a_task_at_its_floor_has_no_point(findings):
    is_dual = [r["config"]["method"] == "DB-MTL" for r in findings.records]
    records = []
    for record, dual in zip(findings.records, is_dual, strict=True):
        floors = record["floors"]["test"]
        if dual:
            floors = floors | {"small": {"MAE": 0.0}}
        records.append(record | {"floors": record["floors"] | {"test": floors}})
    points = trade_offs(findings_of(findings.question, records), ("unit", "small"))
    assert list(dict.fromkeys(points["arm"])) == ["EW", "LS(weights=[0.2, 1.0, 1.8])"]
