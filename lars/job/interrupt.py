"""Signals that ask a job to stop."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType

from lars.errors import Preempted


class Interrupt:
    """Handles the stop signals of this process.

    Batch systems send SIGTERM or a user signal some time before they kill a job. The training loop passes the request
    to all ranks at the next step, saves, and exits with a code that means: run the same command again. While there is
    nothing to save, the job ends at once.

    Attributes:
        received: Name of the last signal that arrived. None if there was none.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Install handlers for the signals in `names` (SIGTERM, SIGUSR1 ...)."""
        self.received: str | None = None
        self.names = names
        self._saved: str | None = None
        for name in names:
            signal.signal(getattr(signal, name), self._receive)

    def release(self) -> None:
        """Restore the default action of the signals, which is to end the process."""
        for name in self.names:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        if self.received is not None:
            signal.raise_signal(getattr(signal, self.received))

    def ignore(self) -> None:
        """Ignore the signals, because the job is complete.

        When Python shuts down, it restores the default action of every signal with a handler. A signal that arrived
        then would turn a finished job into a failed one. Python does not change ignored signals.
        """
        for name in self.names:
            signal.signal(getattr(signal, name), signal.SIG_IGN)

    def end_at_once(self, saved: str) -> None:
        """From now on, let a signal end the job at once. `saved` says why no training is lost.

        Raises:
            Preempted: A signal has already arrived. After this call, any statement may raise it.
        """
        self._saved = saved  # before the check, so that no signal is missed between the two
        if self.received is not None:
            self._saved = None
            raise self.preempted(saved)

    def wait_for_step(self) -> None:
        """From now on, let a signal only set `received`. The training loop reads it at the next step."""
        self._saved = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received == name == "SIGINT":  # a second Ctrl-C ends the job without saving
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = name
        if self._saved is not None:
            saved, self._saved = self._saved, None  # raise only once: the job is about to end
            raise self.preempted(saved)

    def preempted(self, saved: str, *, on_all_ranks: bool = False) -> Preempted:
        """Create the exception that ends a job on request. `saved` says where the next job resumes."""
        by = f" ({self.received})" if self.received else ""  # another rank may have received it
        message = f"stopped on request{by}: {saved}; run the same command to resume"
        return Preempted(message, received=self.received, on_all_ranks=on_all_ranks)
