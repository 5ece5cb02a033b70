"""The data tools end with one line, an exit code and no process left, and refuse wrong flags."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import HEARING_SIGNALS, ROOT, environment, run, until, without_reader
from data import synthetic
from data.check import __main__ as check
from data.make_tfrecords import __main__ as make_tfrecords
from data.prepare import __main__ as prepare
from data.tooling import launcher
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
    ("end", "code", "expected"),
    [(ctrl_c, 130, "data.synthetic: interrupted; to continue, run the same command again"),
     (kill_a_worker, 1, "data.synthetic: a worker process was killed, perhaps because memory ran out"),
     (terminate, -signal.SIGTERM, "")],
)  # fmt: skip
def test_a_tool_that_is_ended_reports_it_in_one_line_and_leaves_no_process(
    tool, end, code, expected
):
    assert len(workers(tool)) == 2
    end(tool)
    _, errors = tool.communicate(timeout=30)
    assert tool.returncode == code
    assert errors.startswith(expected)
    assert errors.count("\n") == 1 or end is terminate, errors  # then Python warns about semaphores
    until(lambda: gone(tool.pid), 10)


# What launchers set in the second of two tasks.
LAUNCHED = {
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
    "MPICH": {"PMI_SIZE": "2", "PMI_RANK": "1"},
    "MVAPICH": {"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "1"},
    "srun": {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
    "horovodrun": {"HOROVOD_SIZE": "2", "HOROVOD_RANK": "1"},
    "torchrun": {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"},
}


@pytest.mark.parametrize("name", LAUNCHED)
def test_tasks_and_ranks_are_known_for_every_launcher(name):
    tasks, command = launcher.tasks(LAUNCHED[name])
    assert tasks == 2
    assert command in name or command in ("mpirun", "mpiexec")
    assert launcher.rank(LAUNCHED[name]) == 1
    assert launcher.tasks({}) == (1, "")
    assert launcher.rank({}) == 0


def test_the_tools_know_the_launchers_that_the_trainer_knows():
    from lars import launcher as trainer

    ours, theirs = (
        [(each.name, each.size, each.rank, each.mark) for each in table]
        for table in (launcher.LAUNCHERS, trainer.LAUNCHERS)
    )
    assert ours == theirs


def test_common_variable_names_alone_do_not_mean_torchrun():
    assert launcher.tasks({"WORLD_SIZE": "8", "RANK": "3"}) == (1, "")
    assert launcher.rank({"WORLD_SIZE": "8", "RANK": "3"}) == 0


def launched(rank: int, name: str, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a tool as one of two tasks that do not see each other."""
    variables = LAUNCHED[name] | {k: str(rank) for k, v in LAUNCHED[name].items() if v == "1"}
    return run(sys.executable, "-m", *command, **variables)


@pytest.mark.parametrize("name", ["MVAPICH", "srun", "MPICH", "horovodrun"])
def test_tasks_that_do_not_see_each_other_are_refused(tmp_path, name):
    noise = ["data.synthetic", tmp_path / "noise", "--train-size", "10", "--val-size", "10"]
    root, other = (launched(rank, name, *noise) for rank in (0, 1))
    assert root.returncode == other.returncode == 2
    assert "started 2 tasks, but each of them sees only itself" in root.stderr
    assert "srun --mpi=pmix" in root.stderr
    assert root.stderr.count("data.synthetic: ") == 1
    assert "data.synthetic: " not in other.stderr  # reported once
    assert not (tmp_path / "noise").exists()


@pytest.mark.parametrize("tool", ["data.digits", "data.synthetic"])
def test_torchrun_is_refused(tmp_path, tool):
    done = launched(0, "torchrun", tool, tmp_path / "set")
    assert done.returncode == 2
    assert done.stderr == (
        f"{tool}: torchrun started 2 tasks, but the data tools do not work with it; start one task "
        "with --workers, or use mpirun\n"
    )
    assert not (tmp_path / "set").exists()


@pytest.mark.mpi
def test_mpi_ranks_share_the_work_whatever_else_the_environment_says(tmp_path, mpirun):
    """The ranks of one MPI world work together, also within a step of Slurm."""
    noise = ["-m", "data.synthetic", tmp_path / "noise", "--train-size", "10", "--val-size", "10"]
    done = mpirun(2, *noise, SLURM_STEP_NUM_TASKS="2", MV2_COMM_WORLD_SIZE="2")
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("noise/train/*/*.jpg"))) == 10
    assert done.stdout.count("10 classes, 10 of them written now") == 2  # train and val, once each


@pytest.mark.parametrize("tool", [check, make_tfrecords, prepare, synthetic])
def test_impossible_numbers_of_workers_are_refused(tool, capsys, monkeypatch):
    for number in ("-1", "two", "1.5"):
        with pytest.raises(SystemExit) as caught:
            tool.main(["--workers", number])
        assert caught.value.code == 2
        assert "argument --workers" in capsys.readouterr().err
    for variable, name in (("OMPI_COMM_WORLD_SIZE", "mpirun"), ("SLURM_STEP_NUM_TASKS", "srun")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "2")
            with pytest.raises(SystemExit):
                tool.main(["--workers", "3"])
            assert f"has no effect under {name}" in capsys.readouterr().err


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


def test_head_ends_a_tool_silently():
    code = "import sys; from data.tooling import cli; sys.exit(cli.run('tool', lambda pool: print('x')))"
    assert without_reader(sys.executable, "-c", code) == (128 + signal.SIGPIPE, "")
