"""Files and folders are complete or absent: what is synced when, and what a kill leaves."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from conftest import run
from data.tooling.atomic import new_folder, read_json, replacing, sweep, sweep_beside, write_json


@pytest.fixture
def log(monkeypatch, tmp_path):
    """Record what is synced and renamed, by its name within `tmp_path`."""
    calls = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def name(path):
        path = os.path.relpath(path, tmp_path)
        return path.split(".unfinished.")[0] + "*" * (".unfinished." in path)

    def logged(kind, function):
        def call(source, target):
            calls.append(f"{kind} {name(source)} to {name(target)}")
            function(source, target)

        return call

    def sync(descriptor):
        calls.append(f"sync {name(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", logged("rename", rename))
    monkeypatch.setattr(os, "replace", logged("replace", replace))
    return calls


def test_a_file_is_synced_before_the_rename_and_its_folder_after(tmp_path, log):
    write_json(str(tmp_path / "a.json"), [1])
    assert log == ["sync a.json*", "replace a.json* to a.json", "sync ."]
    assert read_json(str(tmp_path / "a.json")) == [1]


def test_a_file_in_the_current_folder(tmp_path, log, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json("a.json", [1])
    assert log[-1] == "sync ."


def test_a_folder_is_synced_before_the_rename_and_its_parent_after(tmp_path, log):
    with new_folder(str(tmp_path / "set")) as folder:
        os.mkdir(f"{folder}/ant")
        for file in ("ant/1", "ant/2"):
            open(f"{folder}/{file}", "x").close()
        assert log == []
    # The log shows one name for all of them: two files, the folder that holds them, and `folder`.
    assert log == ["sync set*"] * 4 + ["rename set* to set", "sync ."]
    assert sorted(os.listdir(tmp_path / "set" / "ant")) == ["1", "2"]
    umask = os.umask(0o022)
    os.umask(umask)
    assert (tmp_path / "set").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_nothing_has_changed(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail(made):
        with made as unfinished:
            if isinstance(unfinished, str):
                open(f"{unfinished}/half", "x").close()
            else:
                unfinished.write(b"half")
            raise error

    for made in (replacing(str(path)), new_folder(str(tmp_path / "set"))):
        with pytest.raises(error):
            fail(made)
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"before"


def test_an_existing_folder_is_not_replaced(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").touch()
    with pytest.raises(OSError, match="not empty"), new_folder(str(tmp_path / "set")):
        pass
    assert os.listdir(tmp_path) == ["set"]
    assert os.listdir(tmp_path / "set") == ["mine"]


KILLED = """
import os, signal, sys
from data.tooling.atomic import new_folder, replacing

def die():
    os.kill(os.getpid(), signal.SIGKILL)

os.chdir(sys.argv[1])
if sys.argv[2] == "file":
    with replacing("file") as file:
        file.write(b"half")
        file.flush()
        die()
else:
    with new_folder("set") as folder:
        open(folder + "/half", "x").close()
        die()
"""


@pytest.mark.parametrize("what", ["file", "set"])
def test_leftovers_of_a_kill_are_swept(tmp_path, what):
    (tmp_path / "mine.unfinished").touch()
    done = run(sys.executable, "-c", KILLED, tmp_path, what)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(os.listdir(tmp_path)) == 2
    assert not (tmp_path / what).exists()
    sweep(str(tmp_path))
    assert os.listdir(tmp_path) == ["mine.unfinished"]


def test_leftovers_of_one_folder_are_swept_but_not_a_folder_in_progress(tmp_path):
    assert run(sys.executable, "-c", KILLED, tmp_path, "set").returncode == -signal.SIGKILL
    (tmp_path / "set.unfinished").touch()
    (tmp_path / "other.unfinished.x").mkdir()
    path = str(tmp_path / "set")
    with new_folder(path) as living:
        sweep_beside(path)
        names = {os.path.basename(living), "set.unfinished", "other.unfinished.x"}
        assert set(os.listdir(tmp_path)) == names
    assert sorted(os.listdir(tmp_path)) == ["other.unfinished.x", "set", "set.unfinished"]


def test_work_in_progress_is_not_swept(tmp_path):
    with new_folder(str(tmp_path / "set")), replacing(str(tmp_path / "file")):
        making = sorted(os.listdir(tmp_path))
        (tmp_path / "left.unfinished.7").touch()
        (tmp_path / "left.unfinished.8").mkdir()
        sweep(str(tmp_path))
        assert sorted(os.listdir(tmp_path)) == making
    assert sorted(os.listdir(tmp_path)) == ["file", "set"]
