"""Requests to stop: what a signal does in each phase, and what is reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from conftest import HEARING_SIGNALS, environment
from lars.comm.world import World
from lars.errors import Preempted
from lars.job.ending import fail_together
from lars.job.interrupt import Interrupt


@pytest.fixture
def interrupt():
    before = signal.getsignal(signal.SIGUSR1)
    yield Interrupt(["SIGUSR1"])
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_waits_for_the_step(interrupt):
    signal.raise_signal(signal.SIGUSR1)
    assert interrupt.received == "SIGUSR1"


def test_a_signal_ends_at_once_what_has_nothing_to_lose(interrupt):
    interrupt.end_at_once("step 7 is saved")
    with pytest.raises(Preempted, match=r"stopped on request \(SIGUSR1\): step 7 is saved; run the"):
        signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)  # the second one finds a job that is about to end


def test_a_signal_that_came_before_counts(interrupt):
    signal.raise_signal(signal.SIGUSR1)
    with pytest.raises(Preempted):
        interrupt.end_at_once("no step was taken")


def test_after_the_phase_a_signal_waits_again(interrupt):
    interrupt.end_at_once("step 7 is saved")
    interrupt.wait_for_step()
    signal.raise_signal(signal.SIGUSR1)
    assert interrupt.received == "SIGUSR1"


def test_a_second_ctrl_c_ends_at_once():
    script = (
        "import signal, time; from lars.job.interrupt import Interrupt; i = Interrupt(['SIGINT'])\n"
        "signal.raise_signal(signal.SIGINT); print(i.received, flush=True); time.sleep(60)"
    )
    job = subprocess.Popen(
        [*HEARING_SIGNALS, sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE
    )
    assert job.stdout is not None
    assert job.stdout.readline() == b"SIGINT\n"
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=10) == -signal.SIGINT


def test_a_signal_after_the_end_of_the_job_does_not_make_it_fail():
    script = (
        "import signal, os, atexit; from lars.job.interrupt import Interrupt; i = Interrupt(['SIGUSR1']); i.ignore()\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1): kill(pid, number)\n"
        "import sys; sys.last = Last()"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), check=False)
    assert done.returncode == 0


class Recorder(World):
    """A world that only notes how the job ends."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.ends: list[tuple[str, int]] = []

    def abort(self, code: int) -> None:
        self.ends.append(("abort", code))

    def leave(self, code: int) -> None:
        self.ends.append(("leave", code))


def test_a_stop_is_no_error_and_one_rank_reports_it(capsys):
    for rank in (0, 1):
        world = Recorder(rank, 2)
        with fail_together(lambda world=world: world):
            raise Preempted("stopped on request: saved after step 6 of 120", on_all_ranks=True)
        assert world.ends == [("leave", 75)]
    said = capsys.readouterr().err
    assert said.count("stopped on request: saved after step 6 of 120") == 1
    assert "error" not in said
    assert "Traceback" not in said


def test_a_rank_that_stops_alone_ends_the_others(capsys):
    world = Recorder(1, 2)
    with fail_together(lambda: world):
        raise Preempted("stopped on request: step 7 is saved")
    assert world.ends == [("abort", 75)]
    assert os.path.basename(sys.argv[0]) in capsys.readouterr().err
