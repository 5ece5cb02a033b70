"""One rank fails. All ranks must end soon, the first cause is reported once, and the job has one exit code."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from conftest import ROOT

pytestmark = pytest.mark.mpi
SECONDS = 15
SCRIPT = ROOT / "tests" / "ranks" / "failing.py"


def state_of(pid: int) -> str:
    """The state of a process (R, S, T ...). Empty if there is no such process, or only a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""
    return "" if state == "Z" else state


def fail(
    mpirun, tmp_path: Path, phase: str, kind: str, rank: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run two ranks until one fails, and check that both end in time."""
    events = tmp_path / "events"
    done = mpirun(2, SCRIPT, phase, kind, str(rank), events, tmp_path / "logs")
    ended = time.time()
    words = [line.split() for line in events.read_text().splitlines()]
    failed = [float(value) for what, value in words if what == "failed"]
    assert failed, done.stderr
    assert ended - failed[0] < SECONDS
    pids = [int(value) for what, value in words if what == "pid"]
    assert len(pids) == 2
    time.sleep(0.2)
    assert [pid for pid in pids if state_of(pid)] == []
    return done


@pytest.mark.parametrize(
    ("phase", "rank"), [("loading", 1), ("training", 0), ("validation", 1), ("saving", 0)]
)
def test_an_error_in_any_phase_ends_all_ranks_and_is_reported_once(mpirun, tmp_path, phase, rank):
    done = fail(mpirun, tmp_path, phase, "raise", rank)
    assert done.returncode == 1
    assert done.stderr.count("RuntimeError: made to fail") == 1, "the traceback of one rank"
    assert f"error (rank {rank} of 2, {os.uname().nodename}): made to fail" in done.stderr


def test_mpirun_returns_the_exit_code_of_the_error(mpirun, tmp_path):
    done = fail(mpirun, tmp_path, "loading", "data")
    assert done.returncode == 3
    assert done.stderr.count("image 7 cannot be read") == 1
    assert "Traceback" not in done.stderr


def test_a_rank_that_exits_is_a_lost_peer(mpirun, tmp_path):
    done = fail(mpirun, tmp_path, "training", "exit")
    assert done.returncode == 7, done.stderr
    assert "error (rank 0 of 2" in done.stderr


def test_a_killed_rank_ends_the_job(mpirun, tmp_path):
    done = fail(mpirun, tmp_path, "validation", "kill")
    assert done.returncode == 128 + 9, done.stderr
    assert "signal 9" in done.stderr


def test_a_stalled_rank_is_reported_with_its_stack(mpirun, tmp_path):
    done = fail(mpirun, tmp_path, "loading", "sleep")
    assert done.returncode == 6, done.stderr
    assert "(rank 1 of 2" in done.stderr
    assert "this rank has stalled; it made no progress" in done.stderr
    assert 'failing.py", line' in done.stderr, "where it sleeps"
    assert "rank 0 of 2" not in done.stderr


def test_a_frozen_rank_is_noticed_by_the_rank_that_waits_for_it(mpirun, tmp_path):
    done = fail(mpirun, tmp_path, "training", "freeze")
    assert done.returncode == 6, done.stderr
    assert "(rank 0 of 2" in done.stderr
    assert "has waited for the other ranks" in done.stderr
