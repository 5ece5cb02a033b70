"""The data tools end with one line, an exit code and no process left, and refuse wrong flags."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import HEARING_SIGNALS, ROOT, environment, until
from data import prepare, synthetic
from data.check import __main__ as check
from data.make_tfrecords import __main__ as make_tfrecords
from data.tooling.atomic import locked

NOISE = ["--num-classes", "40", "--train-size", "400", "--val-size", "40", "--workers", "2"]


@pytest.fixture
def tool(tmp_path):
    """Start a tool with two workers in its own process group."""
    process = subprocess.Popen(
        [*HEARING_SIGNALS, sys.executable, "-m", "data.synthetic", tmp_path / "noise", *NOISE],
        cwd=ROOT, env=environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    until(lambda: list(tmp_path.glob("noise/train/n???????0")), 60)
    yield process
    process.kill()


def workers(process) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(c) for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]


def gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def ctrl_c(process) -> None:
    os.killpg(process.pid, signal.SIGINT)


def kill_a_worker(process) -> None:
    os.kill(workers(process)[0], signal.SIGKILL)


def terminate(process) -> None:
    process.terminate()


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [(ctrl_c, 130, "data.synthetic: interrupted; to continue, run the same command again"),
     (kill_a_worker, 1, "data.synthetic: a worker process was killed, perhaps because memory ran out"),
     (terminate, -signal.SIGTERM, "")],
)  # fmt: skip
def test_a_tool_that_is_ended_reports_it_in_one_line_and_leaves_no_process(tool, end, code, said):
    assert len(workers(tool)) == 2
    end(tool)
    _, errors = tool.communicate(timeout=30)
    assert tool.returncode == code
    assert errors.startswith(said)
    assert errors.count("\n") == 1 or end is terminate, errors  # then Python warns about semaphores
    until(lambda: gone(tool.pid), 10)


@pytest.mark.parametrize("tool", [check, make_tfrecords, prepare, synthetic])
def test_impossible_numbers_of_workers_are_refused(tool, capsys, monkeypatch):
    for number in ("-1", "two", "1.5"):
        with pytest.raises(SystemExit) as caught:
            tool.main(["--workers", number])
        assert caught.value.code == 2
        assert "argument --workers" in capsys.readouterr().err
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        tool.main(["--workers", "3"])
    assert "has no effect under mpirun" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--report", "--list"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    flag, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for path in ("nowhere/out", "file/out", "", ".", "pipe", "/dev/null"):
        with pytest.raises(SystemExit) as caught:
            check.main(["--train-dir", "t", "--val-dir", "v", flag, os.path.join(tmp_path, path)])
        assert caught.value.code == 2
        assert f"error: {flag}: " in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SystemExit):
        check.main(["--train-dir", "t", "--val-dir", "v", flag, str(tmp_path / "out")])
    assert f"error: {flag}: {tmp_path} cannot be written to" in capsys.readouterr().err


def test_the_second_of_two_tools_in_one_folder_is_refused(tmp_path, capsys):
    noise = [str(tmp_path / "noise"), "--train-size", "10", "--val-size", "10", "--workers", "0"]
    assert synthetic.main(noise) == 0
    train, val = str(tmp_path / "noise" / "train"), str(tmp_path / "noise" / "val")
    folders = ["--train-dir", train, "--val-dir", val, "--workers", "0"]
    for tool, flags, folder in (
        (make_tfrecords, [*folders, "--data-dir", str(tmp_path / "out")], "out"),
        (check, [*folders, "--report", str(tmp_path / "report")], "report.unfinished"),
        (synthetic, noise, "noise/train"),
    ):
        with locked(str(tmp_path / folder)):
            capsys.readouterr()
            assert tool.main(flags) == 2
        errors = capsys.readouterr().err
        assert f"another run is using {tmp_path / folder};" in errors
        assert errors.count("\n") == 1
