"""One job: this process among its ranks, the signals it hears, and how it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lars.comm import start
from lars.comm.world import World
from lars.config.config import Config
from lars.errors import Preempted
from lars.job.ending import fail_together
from lars.job.interrupt import Interrupt
from lars.job.watchdog import Watchdog


class Job:
    """This process as a rank of a job.

    Attributes:
        world: The ranks; a single process until `join`.
        interrupt: Hears the signals that ask the job to stop.
    """

    def __init__(self, interrupt: Interrupt, stall_seconds: float) -> None:
        """Begin without the other ranks."""
        self.world = World()
        self.interrupt, self.stall_seconds = interrupt, stall_seconds
        self._watchdog: Watchdog | None = None

    def join(self, *, on_cpu: bool) -> World:
        """Join the other ranks and start to watch for stalls; `on_cpu` says where the gradients are."""
        self.world = start.join(on_cpu=on_cpu, stall_seconds=self.stall_seconds)
        self._watchdog = Watchdog(self.world, self.stall_seconds)
        return self.world

    @property
    def stop_requested(self) -> bool:
        """Whether a signal has asked this rank to stop."""
        return self.interrupt.received is not None

    def preempted(self, saved: str) -> Preempted:
        """What all ranks end with after a step in which one was asked to stop; `saved` says what is saved."""
        return self.interrupt.preempted(saved, on_all_ranks=True)

    def heartbeat(self, phase: str) -> None:
        """Tell the watchdog that this rank makes progress: a phase begins."""
        if self._watchdog is not None:
            self._watchdog.heartbeat(phase)

    def wait_for_folder(self) -> None:
        """Called while another job holds the run folder."""
        self.heartbeat("waiting for the run folder")

    def close(self) -> None:
        """Stop watching."""
        if self._watchdog is not None:
            self._watchdog.stop()


@contextlib.contextmanager
def job_of(config: Config, interrupt: Interrupt | None = None) -> Iterator[Job]:
    """A job whose ranks end together; `interrupt` may have listened for signals since before torch was loaded."""
    job = Job(interrupt or Interrupt(config.stop_signals), config.stall_seconds)
    with fail_together(lambda: job.world):
        job.interrupt.end_at_once("no step was taken")
        yield job
        job.close()
        job.interrupt.ignore()
