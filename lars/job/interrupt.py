"""Requests to stop."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType

from lars.errors import Preempted


class Interrupt:
    """Knows whether this process has been asked to stop.

    Batch systems send SIGTERM or a user signal some time before they kill a job. The training loop tells all ranks
    at the next step, saves, and exits with a code that means: run the same command again. As long as there is nothing
    to save, the job ends at once.

    Attributes:
        received: Name of the last signal that arrived; None: none yet.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Listen to the signals called `names` (SIGTERM, SIGUSR1 ...)."""
        self.received: str | None = None
        self.names = names
        self._saved: str | None = None
        for name in names:
            signal.signal(getattr(signal, name), self._receive)

    def release(self) -> None:
        """Restore the usual effect of the signals, which is to end the process."""
        for name in self.names:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        if self.received is not None:
            signal.raise_signal(getattr(signal, self.received))

    def ignore(self) -> None:
        """Ignore the signals: the job is complete.

        At its end Python restores the default action of every signal that has a handler, and a signal that arrives
        then would turn a finished job into a failed one.
        """
        for name in self.names:
            signal.signal(getattr(signal, name), signal.SIG_IGN)

    def end_at_once(self, saved: str) -> None:
        """Let a signal end the job from now on wherever it is; `saved` says why nothing is lost.

        Raises:
            Preempted: A signal has arrived already. From now on any statement may raise it.
        """
        if self.received is not None:
            raise self.preempted(saved)
        self._saved = saved

    def wait_for_step(self) -> None:
        """Let a signal only set `received` from now on."""
        self._saved = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received == name == "SIGINT":  # a second Ctrl-C means: do not save
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = name
        if self._saved is not None:
            saved, self._saved = self._saved, None  # once is enough: the job is about to end
            raise self.preempted(saved)

    def preempted(self, saved: str, *, on_all_ranks: bool = False) -> Preempted:
        """What a job that was asked to stop ends with; `saved` says what the next one starts from."""
        by = f" ({self.received})" if self.received else ""  # another rank may have received it
        message = f"stopped as asked{by}: {saved}; run the same command to resume"
        return Preempted(message, received=self.received, on_all_ranks=on_all_ranks)
