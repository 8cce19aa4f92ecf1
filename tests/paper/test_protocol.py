"""The protocol is older than the records that it covers, and was not reworded."""

import subprocess
from datetime import UTC, datetime

import pytest

from dbmtl.experiments.method_labels import label_of
from dbmtl.experiments.questions import (
    QUESTIONS,
    evidence_folder,
    protocol_file,
    read_journal,
    section_hash,
    section_of,
)
from dbmtl.experiments.records import project_root, read_records
from dbmtl.report.protocol import first_commit, protocol_text, question_text, records_before

RECORDS = read_records(evidence_folder())
# The commits that put these before their runs are lost: see the deviations in the protocol. 1c
# repeats 1a. No question may join them.
WITHOUT_HISTORY = {"1a", "1b"}
LOST_UNTIL = datetime(2026, 12, 2, 8, 40, tzinfo=UTC)


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
    text = protocol_file().read_text()
    before_deviations = text.partition("## Deviations")[0]
    assert before_deviations == protocol_text(QUESTIONS).partition("## Deviations")[0]


def first_in_journal(question) -> datetime | None:
    "When the journal first has this question in its present wording."
    for line in read_journal():
        if line["question"] == question.name and line["section"] == section_hash(
            question_text(question)
        ):
            return datetime.fromisoformat(line["time"])
    return None


def asked_at(question) -> datetime:
    "When this wording is known to have been there: by the history, or else by the journal."
    times = [first_in_journal(question)]
    if has_history():
        times.append(first_commit(question.name)[0])
    return min(
        (time for time in times if time is not None), default=datetime.max.replace(tzinfo=UTC)
    )


def is_without_history(record: dict) -> bool:
    "Is this a run of 1a or 1b, from before the present history?"
    return datetime.fromisoformat(record["written"]) < LOST_UNTIL


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)
def test_a_question_was_not_reworded(question):
    if not has_history():
        pytest.skip("no history: a shallow clone, or no clone at all")
    _, section = first_commit(question.name)
    assert section == section_of(protocol_file().read_text(), question.name)
    assert section == question_text(question)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)
def test_a_question_is_older_than_its_records(question):
    if not has_history() and first_in_journal(question) is None:
        pytest.skip("no history: a shallow clone, or no clone at all")
    records = [record for record in of_question(question) if not is_without_history(record)]
    before = records_before(question, records, asked_at(question))
    for other in QUESTIONS:  # a run may belong to an earlier question, too
        if (other.benchmark, other.scale) == (question.benchmark, question.scale):
            too_early = records_before(other, records, asked_at(other))
            covered = {record for record in of_labels(other) if record not in too_early}
            before = [record for record in before if record not in covered]
    assert before == []


@pytest.mark.parametrize(
    "line", read_journal(), ids=lambda line: f"{line['question']}-{line['time']}"
)
def test_the_journal_has_the_wording_of_the_protocol(line):
    section = section_of(protocol_file().read_text(), line["question"])
    assert line["section"] == section_hash(section)


def test_records_without_history_are_those_of_two_questions():
    old = [record for record in RECORDS if is_without_history(record)]
    lost = [question for question in QUESTIONS if question.name in WITHOUT_HISTORY]
    places = {(question.benchmark, question.scale) for question in lost}
    seeds = {seed for question in lost for seed in (*question.seeds, *question.tuning_seeds)}
    assert len(old) == 304  # none is added
    for record in old:
        config = record["config"]
        assert (config["benchmark"], config["scale"]["name"]) in places
        assert config["seed"] in seeds


def test_what_has_no_history_is_repeated_with_one():
    repeated = next(question for question in QUESTIONS if question.name == "1c")
    assert first_in_journal(repeated) is not None
    assert not set(repeated.seeds) & {
        record["config"]["seed"] for record in RECORDS if is_without_history(record)
    }


def test_every_record_of_the_evidence_belongs_to_a_question():
    seeds = {}
    for question in QUESTIONS:
        of_place = seeds.setdefault((question.benchmark, question.scale), set())
        of_place |= {*question.seeds, *question.tuning_seeds}
    for record in RECORDS:
        config = record["config"]
        place = (config["benchmark"], config["scale"]["name"])
        assert config["seed"] in seeds[place], label_of(record)
        assert record["written"]
        # what broke off for a reason of the machine would have been run again
        assert record["state"] == "finished" or "the loss of task" in record["reason"]


def test_a_record_that_is_older_is_found():
    question = QUESTIONS[0]
    records = of_question(question)
    assert len(records) > 100
    times = sorted(record["written"] for record in records)
    middle = datetime.fromisoformat(times[len(times) // 2])
    assert records_before(question, records, middle)
