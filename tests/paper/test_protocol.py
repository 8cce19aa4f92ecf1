"""The protocol is older than the records that it covers, and was not reworded."""

import subprocess
from datetime import UTC, datetime

import pytest

from dbmtl.experiments.method_labels import label_of
from dbmtl.experiments.questions import QUESTIONS, evidence_folder
from dbmtl.experiments.records import project_root, read_records
from dbmtl.report.protocol import (
    first_commit,
    protocol_text,
    question_text,
    records_before,
    section_of,
)

FILE = project_root() / "figures" / "protocol.md"
RECORDS = read_records(evidence_folder())


def has_history() -> bool:
    "Is this a clone with all its commits?"
    command = ["git", "rev-parse", "--is-shallow-repository"]
    options = {"cwd": project_root(), "capture_output": True, "text": True}
    try:
        return subprocess.run(command, **options).stdout.strip() == "false"
    except OSError:
        return False


def of_question(question) -> list[dict]:
    return [
        record
        for record in RECORDS
        if record["config"]["benchmark"] == question.benchmark
        and record["config"]["scale"]["name"] == question.scale
    ]


def of_labels(question) -> list[str]:
    "A question's own records, named as `records_before` names them."
    never = datetime.max.replace(tzinfo=UTC)
    return records_before(question, of_question(question), never)


def test_the_file_is_made_from_the_questions():
    text = FILE.read_text()
    before_deviations = text.partition("## Deviations")[0]
    assert before_deviations == protocol_text(QUESTIONS).partition("## Deviations")[0]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)
def test_a_question_is_older_than_its_records_and_was_not_reworded(question):
    if not has_history():
        pytest.skip("no history: a shallow clone, or no clone at all")
    asked, section = first_commit(question.name)
    assert section == section_of(FILE.read_text(), question.name) == question_text(question)
    before = records_before(question, of_question(question), asked)
    for other in QUESTIONS:  # a run may belong to an earlier question, too
        if (other.benchmark, other.scale) == (question.benchmark, question.scale):
            too_early = records_before(other, of_question(other), first_commit(other.name)[0])
            covered = {record for record in of_labels(other) if record not in too_early}
            before = [record for record in before if record not in covered]
    assert before == []


def test_every_record_of_the_evidence_belongs_to_a_question():
    seeds = {
        (question.benchmark, question.scale): {*question.seeds, *question.tuning_seeds}
        for question in QUESTIONS
    }
    for record in RECORDS:
        config = record["config"]
        place = (config["benchmark"], config["scale"]["name"])
        assert config["seed"] in seeds[place], label_of(record)
        assert record["written"] and record["state"] == "finished"


def test_a_record_that_is_older_is_found():
    question = QUESTIONS[0]
    records = of_question(question)
    assert len(records) > 100
    times = sorted(record["written"] for record in records)
    middle = datetime.fromisoformat(times[len(times) // 2])
    assert records_before(question, records, middle)
