"""One job: this process and the other ranks, stop signals, and how the job ends."""

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
    """This process as one rank of a job.

    Attributes:
        world: Communicates with the other ranks. A single process until `join`.
        interrupt: Handles the stop signals.
        phase: What this rank is doing now. Empty after the job, which may have ended with an error.
    """

    def __init__(
        self, interrupt: Interrupt, stall_seconds: float, *, backend: str = "auto"
    ) -> None:
        """Start as a single process."""
        self.world = World()
        self.interrupt, self.stall_seconds, self.backend = interrupt, stall_seconds, backend
        self.phase = "starting"
        self._watchdog: Watchdog | None = None

    def join(self, *, on_cpu: bool) -> World:
        """Join the other ranks and start the watchdog. `on_cpu`: whether the gradients are on CPUs."""
        self.world = start.join(
            backend=self.backend, on_cpu=on_cpu, stall_seconds=self.stall_seconds
        )
        self._watchdog = Watchdog(self.world, self.stall_seconds)
        return self.world

    @property
    def stop_requested(self) -> bool:
        """Whether a signal has asked this rank to stop."""
        return self.interrupt.received is not None

    def preempted(self, saved: str) -> Preempted:
        """Create the exception that ends all ranks after the same step. `saved` says what has been saved."""
        return self.interrupt.preempted(saved, on_all_ranks=True)

    def heartbeat(self, phase: str) -> None:
        """Reset the watchdog: this rank makes progress and begins `phase`."""
        self.phase = phase
        if self._watchdog is not None:
            self._watchdog.heartbeat(phase)

    def wait_for_folder(self) -> None:
        """Reset the watchdog while another job holds the run folder."""
        self.heartbeat("waiting for the run folder")

    def close(self) -> None:
        """Stop the watchdog."""
        self.phase = ""
        if self._watchdog is not None:
            self._watchdog.stop()


@contextlib.contextmanager
def job_of(config: Config, interrupt: Interrupt | None = None) -> Iterator[Job]:
    """Run a block as a job whose ranks end together. `interrupt`: handlers that a script has already installed."""
    job = Job(
        interrupt or Interrupt(config.stop_signals), config.stall_seconds, backend=config.backend
    )
    try:
        with fail_together(lambda: job.world):
            job.interrupt.end_at_once("no step was taken")  # there is nothing to save yet
            start.check(backend=config.backend, bfloat16=config.bf16_allreduce)
            try:
                yield job
            finally:
                job.interrupt.wait_for_step()  # a signal must not replace an error that is being reported
            job.interrupt.ignore()
    finally:
        job.close()  # after an error too: the process may go on, for example in a notebook
