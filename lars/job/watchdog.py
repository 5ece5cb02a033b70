"""Noticing that a rank makes no progress: a job that hangs burns its allocation in silence."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from types import FrameType

from lars.comm.world import World
from lars.errors import EXIT_STALLED

# A rank that waits for the others lets them report first: the stalled rank knows best where it hangs.
_PATIENCE_WHILE_WAITING = 1.5


class Watchdog:
    """Ends the job if this rank has made no progress for too long, with its Python stacks in the log.

    It watches from a thread of its own, which a blocked read, lock or collective does not stop. If the whole process
    is stopped, or its host is dead, the other ranks notice it, because they wait for it.
    """

    def __init__(self, world: World, seconds: float) -> None:
        """Start to watch; `seconds` is how long a phase may take, 0 for any length."""
        self.world, self.seconds = world, seconds
        self.heartbeat("starting")
        self._over = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def heartbeat(self, phase: str) -> None:
        """Record progress: a phase (a step, a validation batch, a checkpoint) begins."""
        self.phase, self.since = phase, time.monotonic()

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.seconds / 10)):
            silent = time.monotonic() - self.since
            if silent < self.seconds:
                continue
            frame = sys._current_frames()[threading.main_thread().ident or 0]
            waits = _waits_for_others(self.world, frame)
            if not waits or silent >= _PATIENCE_WHILE_WAITING * self.seconds:
                self._end(silent, waits)

    def _end(self, silent: float, waits: bool) -> None:
        what = (
            "has waited for the other ranks: one of them has stopped, or cannot be reached"
            if waits
            else "has stopped"
        )
        where = f"rank {self.world.rank} of {self.world.size}, {socket.gethostname()}"
        print(
            f"{os.path.basename(sys.argv[0])}: error ({where}): this rank {what}; it made no progress for "
            f"{silent:.0f} s in: {self.phase}. Its stack traces follow; --stall-seconds sets the limit",
            file=sys.stderr,
        )
        faulthandler.dump_traceback(sys.stderr)
        self.world.abort(EXIT_STALLED)


def _waits_for_others(world: World, frame: FrameType | None) -> bool:
    """Whether a stack is inside the backend, which is where ranks wait for each other."""
    while frame is not None:
        if world.is_waiting(frame):
            return True
        frame = frame.f_back
    return False
