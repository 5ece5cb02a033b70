"""Stop signals: what a signal does in each phase of a job, and what is reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from conftest import HEARING_SIGNALS, environment, until
from lars.comm.world import World
from lars.config import Config
from lars.errors import LostPeerError, Preempted, UsageError
from lars.job import ending
from lars.job import job as job_module
from lars.job.ending import fail_together
from lars.job.interrupt import Interrupt


@pytest.fixture
def interrupt():
    before = signal.getsignal(signal.SIGUSR1)
    yield Interrupt(["SIGUSR1"])
    signal.signal(signal.SIGUSR1, before)


def test_during_training_a_signal_is_only_recorded(interrupt):
    signal.raise_signal(signal.SIGUSR1)
    assert interrupt.received == "SIGUSR1"


def test_a_signal_ends_the_job_at_once_if_no_training_is_lost(interrupt):
    interrupt.end_at_once("step 7 is saved")
    with pytest.raises(
        Preempted, match=r"stopped on request \(SIGUSR1\): step 7 is saved; run the"
    ):
        signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)  # a second signal has no effect: the job is about to end


def test_an_earlier_signal_ends_the_job_too(interrupt):
    signal.raise_signal(signal.SIGUSR1)
    with pytest.raises(Preempted):
        interrupt.end_at_once("no step was taken")


def test_after_the_validation_a_signal_is_only_recorded_again(interrupt):
    interrupt.end_at_once("step 7 is saved")
    interrupt.wait_for_step()
    signal.raise_signal(signal.SIGUSR1)
    assert interrupt.received == "SIGUSR1"


def test_a_second_ctrl_c_ends_at_once():
    script = (
        "import signal, time; from lars.job.interrupt import Interrupt; i = Interrupt(['SIGINT'])\n"
        "signal.raise_signal(signal.SIGINT); print(i.received, flush=True)\n"
        "while True: time.sleep(0.05)"  # not one long sleep: a signal just before it would wait for its end
    )
    job = subprocess.Popen(
        [*HEARING_SIGNALS, sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE
    )
    assert job.stdout is not None
    assert job.stdout.readline() == b"SIGINT\n"
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=10) == -signal.SIGINT


def test_a_signal_after_the_end_does_not_make_a_finished_job_fail():
    script = (
        "import signal, os, atexit; from lars.job.interrupt import Interrupt; i = Interrupt(['SIGUSR1']); i.ignore()\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1): kill(pid, number)\n"
        "import sys; sys.last = Last()"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), check=False)
    assert done.returncode == 0


def test_a_stop_is_never_taken_for_an_error():
    """Decoders and unpicklers turn whatever they raise into errors of their own."""
    assert not issubclass(Preempted, Exception)


def test_a_signal_does_not_replace_an_error_that_is_being_reported(interrupt, monkeypatch, capsys):
    world = Recorder(0, 1)
    monkeypatch.setattr(job_module, "World", lambda: world)
    monkeypatch.setattr(ending.launcher, "wait_to_report", lambda *_, **__: signal.raise_signal(10))
    with job_module.job_of(Config(), interrupt):
        raise UsageError("--flag is wrong")
    assert world.ends == [("abort", 2)]
    assert "--flag is wrong" in capsys.readouterr().err


class Recorder(World):
    """A world that only records how the job ends."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.ends: list[tuple[str, int]] = []

    def abort(self, code: int) -> None:
        self.ends.append(("abort", code))

    def leave(self, code: int) -> None:
        self.ends.append(("leave", code))


def test_a_requested_stop_is_not_an_error_and_one_rank_reports_it(capsys):
    for rank in (0, 1):
        world = Recorder(rank, 2)
        with fail_together(lambda world=world: world):
            raise Preempted("stopped on request: saved after step 6 of 120", on_all_ranks=True)
        assert world.ends == [("leave", 75)]
    output = capsys.readouterr().err
    assert output.count("stopped on request: saved after step 6 of 120") == 1
    assert "error" not in output
    assert "Traceback" not in output


def test_a_rank_that_stops_alone_ends_the_others(capsys):
    world = Recorder(1, 2)
    with fail_together(lambda: world):
        raise Preempted("stopped on request: step 7 is saved")
    assert world.ends == [("abort", 75)]
    assert os.path.basename(sys.argv[0]) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "is_echo"),
    [(LostPeerError("rank 1 cannot connect"), 7, True), (UsageError("--flag is wrong"), 2, False)],
)
def test_a_lost_rank_reports_its_cause_before_the_others(monkeypatch, error, code, is_echo):
    """This rank had not joined yet. The rank that ended has the cause."""
    world, waits = Recorder(0, 1), []
    monkeypatch.setattr(
        ending.launcher, "wait_to_report", lambda code, *, met, echo: waits.append((code, echo))
    )
    with fail_together(lambda: world):
        raise error
    assert waits == [(code, is_echo)]
    assert world.ends == [("abort", code)]


FULL_LOG = """
import sys, time
from data import DataError
from lars.comm.world import World
from lars.job.ending import fail_together
from lars.job.watchdog import Watchdog
if sys.argv[1] == "stall":
    Watchdog(World(), 0.1)
    time.sleep(60)
with fail_together(World):
    raise DataError("made to fail")
"""


@pytest.mark.parametrize(("how", "code"), [("stall", 6), ("error", 3)])
def test_a_job_whose_log_is_on_a_full_disk_ends(how, code):
    with open("/dev/full", "w") as log:
        done = subprocess.run(
            [sys.executable, "-c", FULL_LOG, how], env=environment(), stdout=log, stderr=log, timeout=50, check=False
        )  # fmt: skip
    assert done.returncode == code


def test_a_job_that_ends_with_an_error_leaves_no_watchdog(monkeypatch):
    """Otherwise the process would be ended --stall-seconds later, if it goes on."""

    def watchdogs() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "watchdog"]

    def fail() -> None:
        with job_module.job_of(Config(stop_signals=(), stall_seconds=60.0)) as job:
            job.join(on_cpu=True)
            assert len(watchdogs()) == len(before) + 1
            raise UsageError("made to fail")

    monkeypatch.setattr(World, "abort", lambda self, code: sys.exit(code))
    before = watchdogs()
    with pytest.raises(SystemExit):
        fail()
    until(lambda: len(watchdogs()) == len(before), 20)
