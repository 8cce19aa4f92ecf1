"""Answers to a question: about all tasks or one, and the paper's beside them."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from helpers.records import last_ten, records_of_toy_question

from dbmtl.experiments.metrics import delta_p_per_task
from dbmtl.experiments.questions import Arm, Question, get_question
from dbmtl.report.answers import (
    answer_rows,
    answers_figure,
    evidence_of,
    findings_of,
    printed_differences,
)
from dbmtl.report.ledger import Place, compared
from dbmtl.report.protocol import question_text

PAIR = ("DB-MTL", "EW")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    "A question about all tasks, and its records."
    question = Question(
        name="toy",
        title="Is there a difference?",
        why="A test.",
        benchmark="toy",
        scale="smoke",
        arms=(Arm("STL"), Arm("EW"), Arm("DB-MTL")),
        pairs=(PAIR, ("EW", "STL")),
        effect=1.0,
        deviation=0.5,
        seeds=(100, 101, 102),
        minutes=0.1,
    )
    return question, records_of_toy_question(question, tmp_path_factory.mktemp("runs"))


def test_a_question_about_one_task_is_answered_by_that_task(asked):
    question, records = asked
    directions = records[0]["directions"]
    means = {}
    for task in directions:
        differences = []
        for seed in question.seeds:
            stl = last_ten(records, "STL", seed)
            gains = [
                delta_p_per_task(last_ten(records, method, seed), stl, directions)[task]
                for method in PAIR
            ]
            differences.append(gains[0] - gains[1])
        means[task] = np.mean(differences)
        found = findings_of(replace(question, task=task), records).answer(*PAIR)
        np.testing.assert_allclose(found.interval.mean, means[task], rtol=1e-9)
    whole = findings_of(question, records).answer(*PAIR)
    np.testing.assert_allclose(whole.interval.mean, np.mean(list(means.values())), rtol=1e-9)
    assert len({round(mean, 6) for mean in means.values()}) == len(means)


def test_text_and_picture_name_the_task(asked):
    question, records = asked
    task = next(iter(records[0]["directions"]))
    of_task = replace(question, task=task)
    assert f"Delta_p is that of the task {task} alone, relative to STL" in question_text(of_task)
    assert "alone, relative" not in question_text(question)
    for each, is_named in ((of_task, True), (question, False)):
        label = answers_figure(findings_of(each, records)).axes[0].get_xlabel()
        assert (task in label) is is_named


def test_the_effect_of_a_question_about_a_task_judges_that_task_alone(asked):
    question, records = asked
    task = next(iter(records[0]["directions"]))
    huge = replace(question, task=task, effect=1e6)
    [evidence] = evidence_of(findings_of(huge, records), "streets")
    assert evidence.task == task and evidence.effect == 1e6
    runs = {(r["config"]["method"], r["config"]["seed"]): r for r in deepcopy(evidence.records)}
    for seed, factor in zip(question.seeds, (0.9, 1.0, 1.1), strict=True):  # no sign in any task
        for rule, equal in runs["EW", seed]["selected"].items():
            results = runs["DB-MTL", seed]["selected"][rule]["test"]
            for name, metrics in equal["test"].items():
                results[name] = {"MAE": factor * metrics["MAE"]}
    for record in runs.values():  # nothing is judged at smoke scale
        record["config"]["scale"] = record["config"]["scale"] | {"name": "cpu"}
    evidence = evidence._replace(records=tuple(runs.values()))
    place = Place(*evidence)
    assert place.size == "cpu, own rates"
    weights = {"DB-MTL": 1, "EW": -1}
    assert "matters" in compared("C02", place, weights, task=task).verdict
    assert "matters" not in compared("C02", place, weights).verdict


def test_the_paper_stands_beside_the_pairs_that_it_prints(asked):
    _, records = asked
    printed = printed_differences(get_question("1c"))
    rate = "EW(learning_rate=0.0003)"
    assert printed["DB-MTL", rate].mean == pytest.approx(1.05 + 0.61)
    assert printed["DB-MTL", "STL(learning_rate=0.003)"].mean == pytest.approx(1.05)
    assert not any(second.startswith("LS") for _, second in printed)  # it prints no fixed weights
    of_normals = printed_differences(get_question("6"))
    assert of_normals["DB-MTL", "STL"].mean == pytest.approx(-0.61, abs=0.01)
    assert len(of_normals) == 3
    for name in ("1b", "2b", "7a"):  # SGD, PACS and rooms are ours
        assert printed_differences(get_question(name)) == {}


def test_rows_and_picture_have_the_paper_where_it_prints_something(asked):
    findings = findings_of(*asked)
    printed = {PAIR: printed_differences(get_question("1a"))["DB-MTL", "EW"]}
    rows = answer_rows(findings, printed=printed)
    assert [row["paper"] for row in rows] == [printed[PAIR].in_words, "-"]
    assert all("paper" not in row for row in answer_rows(findings))
    ours, both = (answers_figure(findings, printed=each).axes[0] for each in (None, printed))
    texts = [text.get_text() for text in both.get_legend().get_texts()]
    assert texts[-1] == "paper" and len(both.lines) > len(ours.lines)
    marks = [line for line in both.lines if printed[PAIR].mean in np.asarray(line.get_xdata())]
    assert len(marks) == 1
