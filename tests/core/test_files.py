"""Files written whole, locks between processes, and the folders of data sets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dbmtl.core import files
from dbmtl.core.files import (
    cache_folder,
    data_folder,
    file_lock,
    missing_data,
    source_folder,
    write_atomically,
)


def test_write_atomically_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "record.json"
    write_atomically(path, b"old")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["record.json"]


def test_write_atomically_has_the_whole_content_on_disk_before_the_file_is_seen(
    tmp_path, monkeypatch
):
    path = tmp_path / "record.json"
    seen = []

    def look(file):
        seen.append((os.fstat(file).st_size, path.exists()))

    monkeypatch.setattr(files.os, "fsync", look)
    write_atomically(path, b"short")
    assert seen == [(5, False)]


def test_two_processes_write_one_file_and_the_last_one_stays(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    sync = os.fsync
    monkeypatch.setattr(files.os, "getpid", lambda: 1)

    def the_other_writes_meanwhile(file):
        sync(file)
        monkeypatch.setattr(files.os, "fsync", sync)
        monkeypatch.setattr(files.os, "getpid", lambda: 2)
        write_atomically(path, b"of the other")

    monkeypatch.setattr(files.os, "fsync", the_other_writes_meanwhile)
    write_atomically(path, b"of the first")
    assert path.read_bytes() == b"of the first" and list(tmp_path.iterdir()) == [path]


def test_file_lock_is_exclusive_between_processes_and_gone_with_its_process(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "run.lock"
    code = (
        "import sys\nfrom dbmtl.core.files import file_lock\n"
        "with file_lock(sys.argv[1]):\n    print('locked', flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(files.__file__).parents[2],
    ) as child:
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError, match="another process works on run.lock"):
            with file_lock(path):
                pass
        child.kill()
    with file_lock(path) as is_locked:
        assert is_locked


def test_folders_follow_the_environment(monkeypatch):
    monkeypatch.setenv("DBMTL_DATA", "raw")
    monkeypatch.setenv("DBMTL_CACHE", "made")
    assert data_folder() == Path("raw") and cache_folder() == Path("made")
    assert source_folder("qm9") == Path("raw/qm9")
    assert source_folder("qm9", "here") == Path("here")
    for name in ("DBMTL_DATA", "DBMTL_CACHE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert data_folder() == Path("cache/dbmtl")
    assert cache_folder() == Path("cache/dbmtl/prepared")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: str(path).replace("~", "/a/user"))
    assert cache_folder() == Path("/a/user/.cache/dbmtl/prepared")


def test_an_empty_variable_is_none(monkeypatch):
    for name in ("DBMTL_DATA", "DBMTL_CACHE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert data_folder() == Path("cache/dbmtl")
    assert cache_folder() == Path("cache/dbmtl/prepared")


def test_missing_data_names_folder_and_recipe(monkeypatch):
    monkeypatch.delenv("DBMTL_DATA", raising=False)
    error = missing_data("Rooms", Path("somewhere"), "Go there.")
    assert isinstance(error, FileNotFoundError)
    assert str(error) == "Rooms is not in somewhere (DBMTL_DATA is not set).\nGo there."
    monkeypatch.setenv("DBMTL_DATA", "elsewhere")
    assert "DBMTL_DATA is elsewhere" in str(missing_data("Rooms", Path("somewhere"), "Go there."))
