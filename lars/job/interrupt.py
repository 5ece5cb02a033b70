"""Requests to stop: a signal sets a flag, and nothing else happens in its handler."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType


class Interrupt:
    """Knows whether this process has been asked to stop.

    Batch systems send SIGTERM or a user signal some time before they kill a job. The training loop tells all ranks
    at the next step, saves, and exits with a code that means: run the same command again.

    Attributes:
        received: Name of the last signal that arrived; None: none yet.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Listen to the signals called `names` (SIGTERM, SIGUSR1 ...)."""
        self.received: str | None = None
        self.names = names
        for name in names:
            signal.signal(getattr(signal, name), self._receive)

    def release(self) -> None:
        """Restore the usual effect of the signals, which is to end the process."""
        for name in self.names:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        if self.received is not None:
            signal.raise_signal(getattr(signal, self.received))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
