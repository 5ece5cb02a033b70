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
        self._at_once = False
        for name in names:
            signal.signal(getattr(signal, name), self._receive)

    def release(self) -> None:
        """Restore the usual effect of the signals, which is to end the process."""
        for name in self.names:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        if self.received is not None:
            signal.raise_signal(getattr(signal, self.received))

    def end_at_once(self) -> None:
        """Let a signal end the job from now on wherever it is, because there is nothing to save.

        Raises:
            Preempted: A signal has arrived already. From now on any statement may raise it.
        """
        if self.received is not None:
            raise self._nothing_to_save()
        self._at_once = True

    def wait_for_step(self) -> None:
        """Let a signal only set `received` from now on."""
        self._at_once = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received == name == "SIGINT":  # a second Ctrl-C means: do not save
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = name
        if self._at_once:
            self._at_once = False  # once is enough: the job is about to end
            raise self._nothing_to_save()

    def _nothing_to_save(self) -> Preempted:
        return Preempted(
            f"stopped as asked ({self.received}) before the next step: nothing was lost; "
            "run the same command again"
        )
