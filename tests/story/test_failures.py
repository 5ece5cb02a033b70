"""One rank fails. All ranks must end soon, the first cause is reported once, and the job has one exit code."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from conftest import ROOT, Ranks, ranks_of

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


class Failed:
    """How a job of two ranks ended.

    Attributes:
        code: Its exit code.
        stderr: What the ranks printed there.
    """

    def __init__(self, ranks: Ranks, tmp_path: Path, phase: str, kind: str, rank: int = 1) -> None:
        """Run two ranks until one fails, and check that both end soon."""
        events = tmp_path / "events"
        done = ranks(2, SCRIPT, phase, kind, str(rank), events, tmp_path / "logs")
        ended = time.time()
        words = [line.split() for line in events.read_text().splitlines()]
        failed = [float(value) for what, value in words if what == "failed"]
        assert failed, done.stderr
        assert ended - failed[0] < SECONDS
        pids = [int(value) for what, value in words if what == "pid"]
        assert len(pids) == 2
        time.sleep(0.2)
        assert [pid for pid in pids if state_of(pid)] == []
        self.code = ranks.code(done.returncode, done.stderr)
        self.stderr = ranks.by_the_ranks(done.stderr)


# Three phases fail under one engine only, because the way in which a rank fails does not depend on its phase.
@pytest.mark.parametrize(
    ("engine", "phase", "rank"),
    [
        ("horovod", "loading", 1),
        ("horovod", "training", 0),
        ("horovod", "validation", 1),
        ("horovod", "saving", 0),
        ("torch", "training", 0),
        ("torch", "validation", 1),
    ],
)
def test_an_error_in_any_phase_ends_all_ranks_and_is_reported_once(tmp_path, engine, phase, rank):
    failed = Failed(ranks_of(engine), tmp_path, phase, "raise", rank)
    assert failed.code == 1
    assert failed.stderr.count("RuntimeError: made to fail") == 1, "the traceback of one rank"
    assert f"error (rank {rank} of 2, {os.uname().nodename}): made to fail" in failed.stderr
    assert failed.stderr.count("error (") == 1


def test_the_job_ends_with_the_exit_code_of_the_error(ranks, tmp_path):
    failed = Failed(ranks, tmp_path, "loading", "data")
    assert failed.code == 3
    assert failed.stderr.count("image 7 cannot be read") == 1
    assert "Traceback" not in failed.stderr


def test_a_rank_that_exits_is_a_lost_peer(ranks, tmp_path):
    failed = Failed(ranks, tmp_path, "training", "exit")
    assert failed.code == 7, failed.stderr
    assert "error (rank 0 of 2" in failed.stderr


def test_a_killed_rank_ends_the_job(ranks, tmp_path):
    failed = Failed(ranks, tmp_path, "validation", "kill")
    assert failed.code == 128 + 9, failed.stderr
    if ranks.engine == "horovod":  # torchrun says it in its report
        assert "signal 9" in failed.stderr


def test_a_stalled_rank_is_reported_with_its_stack(ranks, tmp_path):
    failed = Failed(ranks, tmp_path, "loading", "sleep")
    assert failed.code == 6, failed.stderr
    assert "(rank 1 of 2" in failed.stderr
    assert "this rank has stalled; it made no progress" in failed.stderr
    assert 'failing.py", line' in failed.stderr, "where it sleeps"
    assert "rank 0 of 2" not in failed.stderr


def test_a_frozen_rank_is_noticed_by_the_rank_that_waits_for_it(ranks, tmp_path):
    failed = Failed(ranks, tmp_path, "training", "freeze")
    assert failed.code == 6, failed.stderr
    assert "(rank 0 of 2" in failed.stderr
    assert "has waited for the other ranks" in failed.stderr
