"""Checkpoints: damage is noticed, and one process at a time works on a run."""

import pytest

from dbmtl.benchmarks.toy import toy
from dbmtl.experiments.train import train


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
