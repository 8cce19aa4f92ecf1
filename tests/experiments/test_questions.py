"""Questions: tuning on validation and tuning seeds alone, stages, the command."""

import contextlib
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dbmtl.experiments import questions
from dbmtl.experiments.method_labels import label_of
from dbmtl.experiments.paired_tests import answer, power, seeds_needed, smaller_than
from dbmtl.experiments.questions import (
    Arm,
    Question,
    candidates,
    chosen_labels,
    drawn_weights,
    main,
    next_runs,
    rates,
    read_journal,
    records_of,
    run_question,
    section_of,
    tuning_scores,
)
from dbmtl.experiments.records import configuration, read_records, run_identity, write_record
from dbmtl.experiments.terminal import parse_duration
from dbmtl.report.answers import answer_rows, findings_of


def toy_question(**changes) -> Question:
    question = Question(
        name="toy",
        title="Does it run?",
        why="Of no use.",
        benchmark="toy",
        scale="smoke",
        arms=(Arm("STL"), Arm("EW", rates(1e-3, 1e-2)), Arm("DB-MTL", like="EW")),
        pairs=(("DB-MTL", "EW"),),
        effect=1.0,
        deviation=0.5,
        seeds=(100, 101),
        tuning_seeds=(50,),
        minutes=0.1,
    )
    return replace(question, **changes)


def invented(label, seed, error, test_error=1.0, state="finished"):
    "A record of the toy whose validation and test errors are given."
    method, _, rate = label.partition("@")
    hyper = {"learning_rate": float(rate)} if rate else {}
    selections = {}
    for rule in ("best validation epoch", "average of the last ten epochs"):
        selections[rule] = {
            "epoch": 1,
            "validation": {"a": {"MAE": error}},
            "test": {"a": {"MAE": test_error}},
        }
    return {
        "config": {"method": method, "hyper": hyper, "seed": seed, "benchmark": "toy"},
        "state": state,
        "selected": selections,
        "directions": {"a": {"MAE": "down"}},
    }


def test_validation_chooses_and_test_does_not():
    records = [
        invented("EW", 50, error=2.0, test_error=0.1),
        invented("EW@0.01", 50, error=1.0, test_error=9.0),
    ]
    assert chosen_labels(toy_question(), records)["EW"] == "EW(learning_rate=0.01)"


def test_fresh_seeds_do_not_choose():
    records = [
        invented("EW", 50, error=1.0),
        invented("EW@0.01", 50, error=2.0),
        invented("EW@0.01", 100, error=0.01),
    ]
    assert chosen_labels(toy_question(), records)["EW"] == "EW"


def test_an_arm_follows_the_choice_of_another():
    records = [invented("EW", 50, error=2.0), invented("EW@0.01", 50, error=1.0)]
    chosen = chosen_labels(toy_question(), records)
    assert chosen["DB-MTL"] == "DB-MTL(learning_rate=0.01)"
    labels, seeds = next_runs(toy_question(), records)
    assert seeds == (100, 101) and set(labels) == set(chosen.values())


def test_what_an_arm_tries_itself_wins_over_what_it_inherits():
    arm = Arm("DB-MTL(beta=0.1)", rates(1e-3, 1e-1), like="EW")
    question = toy_question(arms=(Arm("STL"), Arm("EW", rates(1e-2)), arm), pairs=())
    chosen = {"EW": "EW(learning_rate=0.01)"}
    at_default, at_tenth = candidates(question, arm, chosen)
    assert at_default == "DB-MTL(beta=0.1)"  # 0.001 is the rate of the toy
    assert at_tenth == "DB-MTL(beta=0.1, learning_rate=0.1)"
    own_beta = Arm("DB-MTL(beta=0.1)", like="DB-MTL")
    label = "DB-MTL(beta=0.5, learning_rate=0.01)"
    assert candidates(question, own_beta, {"DB-MTL": label}) == [
        "DB-MTL(beta=0.1, learning_rate=0.01)"
    ]


def test_records_of_another_scale_are_not_those_of_a_question(tmp_path):
    for scale in ("smoke", "cpu"):
        config = configuration("toy", "EW", 50, scale)
        record = {"config": config, "data": {"hash": "d"}, "state": "diverged"}
        write_record(record | {"identity": run_identity(config, "d")}, tmp_path)
    [record] = records_of(toy_question(), tmp_path)
    assert record["config"]["scale"]["name"] == "smoke"


def test_a_section_is_that_of_the_whole_name():
    text = "# All\n\n## 1a. First\n\nOf 1a.\n\n## 1. Second\n\nOf 1.\n"
    assert section_of(text, "1a") == "## 1a. First\n\nOf 1a.\n"
    assert section_of(text, "1") == "## 1. Second\n\nOf 1.\n"
    assert section_of(text, "a") is None


def test_a_run_that_diverged_costs_its_candidate_the_choice():
    runs = {
        "EW": [invented("EW", 50, 1.0), invented("EW", 51, 0.0, state="diverged")],
        "EW(learning_rate=0.01)": [invented("EW@0.01", 50, 5.0), invented("EW@0.01", 51, 5.0)],
    }
    scores = tuning_scores(runs)
    assert scores["EW"] == -math.inf
    assert scores["EW(learning_rate=0.01)"] == 0.0
    assert tuning_scores({"EW": runs["EW"]}) == {"EW": -math.inf}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": (Arm("EW"), Arm("EW"))}, "arms twice"),
        ({"baseline": "ST"}, "did you mean 'STL'"),
        ({"arms": (Arm("STL"), Arm("EW", like="DB"), Arm("DB-MTL"))}, "unknown arm 'DB'"),
        ({"seeds": (50, 100)}, "tuned on"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        toy_question(**changes)


def test_the_command_trains_packs_and_answers(tmp_path, monkeypatch, capsys):
    question = toy_question()
    monkeypatch.setattr(questions, "QUESTIONS", (question,))
    main(["toy", "--out", str(tmp_path), "--pack"])
    assert "Does it run?" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*.xz")] == ["toy-smoke.jsonl.xz"]
    records = records_of(question, tmp_path)
    assert len(records) == 2 + 3 * 2
    before = read_records(tmp_path)
    run_question(question, tmp_path, progress=False)
    assert read_records(tmp_path) == before and not list(tmp_path.glob("toy/*.json"))
    findings = findings_of(question, records)
    assert findings.is_done and answer_rows(findings)[0]["difference"] == "DB-MTL - EW"
    lacking = [r for r in records if (label_of(r), r["config"]["seed"]) != ("STL", 101)]
    incomplete = findings_of(question, lacking)
    assert not incomplete.is_done
    assert answer_rows(incomplete)[0]["answer"] == "not run"


@pytest.fixture
def asked_for(monkeypatch):
    "The calls of `run_all`, in place of which nothing is trained."
    calls = []

    def trains_nothing(*arguments, **options):
        calls.append(options)
        assert len(calls) < 5, "asked for the same runs again and again"
        return [{"state": "lost", "steps": 0}, {"state": "failed", "steps": 0}]

    monkeypatch.setattr(questions, "run_all", trains_nothing)
    return calls


def test_runs_that_leave_no_record_are_asked_for_once(tmp_path, asked_for):
    assert run_question(toy_question(), tmp_path) == {"STL": "STL"}
    assert len(asked_for) == 1


def test_the_journal_has_a_stage_once_for_each_wording(tmp_path, monkeypatch, asked_for):
    protocol = tmp_path / "protocol.md"
    monkeypatch.setattr(questions, "protocol_file", lambda: protocol)
    out = tmp_path / "evidence"
    for wording in ("in words", "in words", "in other words"):
        protocol.write_text(f"# All\n\n## toy. Does it run?\n\nSaid {wording}.\n\n## 2. Else\n")
        run_question(toy_question(), out)
    first, second = read_journal(out)
    assert first["section"] != second["section"]
    for line in (first, second):
        assert line["question"] == "toy" and line["seeds"] == [50]
        assert line["labels"] == ["EW", "EW(learning_rate=0.01)"]


def test_a_stage_gets_the_time_that_is_left(tmp_path, asked_for):
    run_question(toy_question(), tmp_path, budget="2m")
    run_question(toy_question(), tmp_path)
    assert 115 < parse_duration(asked_for[0]["budget"]) <= 120
    assert asked_for[1]["budget"] is None


def test_questions_share_one_budget(monkeypatch):
    now = [0.0]
    budgets = []

    def takes_four_seconds(question, out, jobs, budget, stop):
        budgets.append(budget)
        now[0] += 4
        return {}

    monkeypatch.setattr(questions, "QUESTIONS", [toy_question(name=name) for name in "abcd"])
    monkeypatch.setattr(questions, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(questions, "run_question", takes_four_seconds)
    main(["a", "b", "c", "d", "--budget", "10s"])
    assert budgets == ["10s", "6s", "2s"]  # twelve seconds are over before d


def test_after_ctrl_c_no_other_question_is_begun(monkeypatch):
    begun = []

    def is_stopped_in_the_second(question, out, jobs, budget, stop):
        begun.append(question.name)
        return {}

    monkeypatch.setattr(questions, "QUESTIONS", [toy_question(name=name) for name in "abc"])
    monkeypatch.setattr(questions, "run_question", is_stopped_in_the_second)
    stopped = contextlib.nullcontext(lambda: len(begun) == 2)
    monkeypatch.setattr(questions, "until_signal", lambda: stopped)
    main(["a", "b", "c"])
    assert begun == ["a", "b"]


def test_drawn_weights_have_mean_one():
    draws = [draw["weights"] for draw in drawn_weights(20, 4)]
    assert all(len(weights) == 4 and min(weights) >= 0 for weights in draws)
    assert [sum(weights) / 4 for weights in draws] == pytest.approx([1.0] * 20, abs=1e-3)
    assert drawn_weights(20, 4) == drawn_weights(20, 4) != drawn_weights(20, 4, seed=1)


def test_the_power_of_a_question_is_at_the_level_of_the_first_of_its_pairs():
    """Without an effect the power is the level: 5 %, divided by the number of pairs."""
    pairs = (("DB-MTL", "EW"), ("EW", "STL"), ("DB-MTL", "STL"), ("STL", "EW"))
    assert toy_question(effect=0.0, pairs=pairs).power == pytest.approx(0.0125)
    assert toy_question(effect=0.0).power == pytest.approx(0.05)


def test_power_and_equivalence_at_their_limits():
    assert power(0.0, 2.0, 5, 0.01) == pytest.approx(0.01, abs=1e-9)
    assert power(100.0, 1.0, 5) == pytest.approx(1.0)
    assert seeds_needed(1.0, 1.0) == 13  # the textbook's number for one standard deviation
    assert seeds_needed(1.0, 1.0, comparisons=4) == 18
    assert power(1.0, 1.0, 17, 0.05 / 4) < 0.9 <= power(1.0, 1.0, 18, 0.05 / 4)
    assert smaller_than([0.1, 0.1, 0.1], 0.5) == 0.0 and smaller_than([0.6, 0.6], 0.5) == 1.0
    assert smaller_than([-0.1, -0.1], 0.5) == 0.0 and smaller_than([-0.6, -0.6], 0.5) == 1.0
    assert answer([0.0, 0.0, 0.0], 0.5).word == "no difference that matters"
    assert answer([], 0.5).word == "not run"
    assert answer([1.0, 1.1, 0.9], 0.5, p=0.2).sign == 0
