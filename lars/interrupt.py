"""Being asked to stop: a signal sets a flag, and nothing else happens in its handler."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType


class Interrupt:
    """Knows whether this process has been asked to stop.

    Batch systems send SIGTERM or a user signal some time before they kill a job. The training loop tells all ranks
    at the next step, saves, and ends with an exit code that means: start the same command again.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Listen to the signals called `names` (SIGTERM, SIGUSR1 ...)."""
        self.received: str | None = None
        self.names = names
        for name in names:
            signal.signal(getattr(signal, name), self._receive)

    def release(self) -> None:
        """Give the signals back their usual meaning, which ends the process."""
        for name in self.names:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        if self.received is not None:
            signal.raise_signal(getattr(signal, self.received))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


class Preempted(Exception):
    """The job was asked to stop and has saved; the same command goes on where it was."""

    exit_code = 75
