"""Checkpoints: damage is noticed, and one process at a time works on a run."""

import errno
import hashlib
import io
import os
import pickle

import pytest
import torch

from dbmtl.benchmarks.toy import toy
from dbmtl.experiments.checkpoints import (
    UnusableCheckpoint,
    checkpoint_lock,
    load_checkpoint,
    save_checkpoint,
)
from dbmtl.experiments.records import read_records
from dbmtl.experiments.train import train


def with_checksum(content):
    """A file as `save_checkpoint` writes it, whatever its content."""
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


class Payload:
    """What unpickling executes: it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["torch", "pickle", "old torch"])
def test_nothing_in_a_checkpoint_is_executed(tmp_path, stopped, kind):
    _, path = stopped()
    trap = tmp_path / "executed"
    state = load_checkpoint(path) | {"trap": Payload(trap)}
    if kind == "old torch":
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=False)
        content = buffer.getvalue()
    else:
        content = saved(state) if kind == "torch" else pickle.dumps(state)
    path.write_bytes(with_checksum(content))
    with pytest.raises(UnusableCheckpoint, match="tensors and plain values alone.*--fresh"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match=path.name):
        train("toy", "EW", out=tmp_path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Payload(trap))).close()
    assert trap.exists()  # the payload is a real one


def test_a_payload_is_passed_over_where_the_previous_checkpoint_is_whole(tmp_path, stopped):
    _, path = stopped(checkpoint_steps=1)
    trap = tmp_path / "executed"
    path.write_bytes(with_checksum(saved({"trap": Payload(trap)})))
    with pytest.warns(UserWarning, match="going on from the previous one"):
        assert train("toy", "EW", out=tmp_path)["steps_now"] == 18 - 3
    assert not trap.exists()


@pytest.mark.parametrize("content", [b"", b"no archive", saved([1, 2]), saved({"step": 3})])
def test_a_checkpoint_that_holds_something_else_is_refused(tmp_path, stopped, content):
    _, path = stopped()
    path.write_bytes(with_checksum(content))
    with pytest.raises(UnusableCheckpoint, match=f"{path.name} .*delete it, or use --fresh"):
        train("toy", "EW", out=tmp_path)


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def no_checkpoints(monkeypatch):
    """A disk that is full for checkpoints, not for a small record."""
    monkeypatch.setattr("dbmtl.experiments.train.save_checkpoint", full_disk)


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(tmp_path, no_checkpoints):
    with pytest.warns(UserWarning, match="No space left.*goes on without") as caught:
        record = train("toy", "EW", out=tmp_path / "full", checkpoint_steps=1)
    assert len(caught) == 1 and record["state"] == "finished"
    assert len(read_records(tmp_path / "full")) == 1
    assert record["curves"] == train("toy", "EW", out=tmp_path / "whole")["curves"]


def test_a_stopped_run_says_that_nothing_was_stored(tmp_path, no_checkpoints):
    with pytest.warns(UserWarning, match="goes on without"):
        part = train("toy", "EW", out=tmp_path, budget=0.0)
    assert part["state"] == "stopped" and "No space left" in part["reason"]


def test_a_folder_that_takes_no_checkpoints_does_not_end_the_run(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning) as caught:
        record = train(
            "toy", "EW", out=tmp_path, checkpoints=tmp_path / "file" / "x", checkpoint_steps=1
        )
    messages = [str(warning.message) for warning in caught]
    assert ["no lock" in messages[0], "goes on without" in messages[1]] == [True, True]
    assert len(messages) == 2 and record["state"] == "finished"


def test_a_full_disk_does_not_cost_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with checkpoint_lock(tmp_path / "run.pt"):
        with pytest.raises(BlockingIOError), checkpoint_lock(tmp_path / "run.pt"):
            pass
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "run.pt", {"step": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.lock"]


def test_a_full_disk_names_the_record_that_it_does_not_take(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with (
        pytest.warns(UserWarning, match="goes on without"),
        pytest.raises(OSError, match="the record of toy EW seed 0 cannot be written to .*No space"),
    ):
        train("toy", "EW", out=tmp_path, checkpoint_steps=9)
    assert not list(tmp_path.glob("*/*.json"))


def test_a_gitignore_that_is_there_is_left_alone(tmp_path):
    (tmp_path / ".gitignore").write_text("*.pt\n")
    with checkpoint_lock(tmp_path / "run.pt"):
        assert (tmp_path / ".gitignore").read_text() == "*.pt\n"


def test_where_both_checkpoints_are_damaged_the_newest_is_named(tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(b"damaged")
    path.with_name("run.pt.previous").write_bytes(b"damaged")
    with pytest.raises(UnusableCheckpoint, match="run.pt is truncated"):
        load_checkpoint(path)


def test_a_disk_that_has_room_again_leaves_no_reason(tmp_path, monkeypatch):
    outcomes = iter([full_disk, save_checkpoint])
    monkeypatch.setattr(
        "dbmtl.experiments.train.save_checkpoint", lambda *arguments: next(outcomes)(*arguments)
    )
    calls = iter(range(100))
    with pytest.warns(UserWarning, match="goes on without"):
        part = train("toy", "EW", out=tmp_path, checkpoint_steps=3, stop=lambda: next(calls) == 4)
    assert (part["state"], part["reason"]) == ("stopped", "")
    assert train("toy", "EW", out=tmp_path)["steps_now"] == 18 - 4


@pytest.mark.parametrize("keep", [0, 1, 64, 66, 500, -1])
def test_a_truncated_checkpoint_names_its_file(tmp_path, stopped, keep):
    _, path = stopped()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="delete it.*--fresh") as caught:
        train("toy", "EW", out=tmp_path)
    assert path.name in str(caught.value)
    assert train("toy", "EW", out=tmp_path, fresh=True)["steps_now"] == 18


def test_a_flipped_bit_is_noticed_and_the_previous_checkpoint_used(tmp_path, stopped):
    whole = train("toy", "EW", out=tmp_path / "whole")
    _, path = stopped(checkpoint_steps=1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="is damaged; going on from the previous one"):
        rest = train("toy", "EW", out=tmp_path)
    assert rest["steps_now"] == 18 - 3  # stored at 1, 2, 3 and when told to stop
    assert rest["curves"] == whole["curves"]


def test_a_finished_run_leaves_no_checkpoint_and_git_ignores_the_folder(tmp_path, stopped):
    _, path = stopped()
    assert path.exists() and (path.parent / ".gitignore").read_text() == "*\n"
    train("toy", "EW", out=tmp_path)
    assert [p.suffix for p in path.parent.iterdir() if p.name != ".gitignore"] == [".lock"]


def test_two_processes_do_not_work_on_one_run(tmp_path):
    data = toy.load(toy.scale("smoke"))
    errors = []

    def nested():
        try:
            train("toy", "EW", out=tmp_path, data=data)
        except BlockingIOError as error:
            errors.append(str(error))
        return True

    train("toy", "EW", out=tmp_path, data=data, stop=nested)
    assert len(errors) == 1 and "another process works on" in errors[0]
