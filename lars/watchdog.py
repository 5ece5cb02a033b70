"""Noticing that a rank has gone to sleep: a job that hangs burns its allocation in silence."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from types import FrameType

from lars.comm import World

EXIT_STALLED = 6

# A rank that waits for the others lets them speak first: the sleeper knows best where it sleeps.
_PATIENCE_OF_WAITERS = 1.5


class Watchdog:
    """Ends the job when this rank has shown no sign of life for too long, with its Python stacks in the log.

    A thread of its own looks; what is stuck (a read, a lock, a collective) does not stop it. A rank that is stuck as a
    whole (a stopped process, a dead host) is noticed by the others, which wait for it.
    """

    def __init__(self, world: World, seconds: float) -> None:
        """Begin to watch; `seconds` is how long a phase may take, 0 for any length."""
        self.world, self.seconds = world, seconds
        self.beat("starting")
        self._over = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self, phase: str) -> None:
        """Show a sign of life: a phase (a step, a batch of the validation, a checkpoint) begins."""
        self.phase, self.since = phase, time.monotonic()

    def stop(self) -> None:
        """Watch no longer."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.seconds / 10)):
            silent = time.monotonic() - self.since
            if silent < self.seconds:
                continue
            waits = _waits_for_others(sys._current_frames()[threading.main_thread().ident or 0])
            if not waits or silent >= _PATIENCE_OF_WAITERS * self.seconds:
                self._end(silent, waits)

    def _end(self, silent: float, waits: bool) -> None:
        what = (
            "has waited for the other ranks: one of them has stopped, or cannot be reached"
            if waits
            else "has stopped"
        )
        where = f"rank {self.world.rank} of {self.world.size}, {socket.gethostname()}"
        print(
            f"{os.path.basename(sys.argv[0])}: error ({where}): this rank {what}; no sign of life for "
            f"{silent:.0f} s in: {self.phase}. Its stacks follow; --stall-seconds says how long is too long",
            file=sys.stderr,
        )
        faulthandler.dump_traceback(sys.stderr)
        self.world.abort(EXIT_STALLED)


def _waits_for_others(frame: FrameType | None) -> bool:
    """Whether the main thread is inside Horovod, which is where ranks wait for each other."""
    while frame is not None:
        if f"{os.sep}horovod{os.sep}" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
