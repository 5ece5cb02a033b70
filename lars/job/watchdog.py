"""Detection of ranks that make no progress. Without it, a job that hangs would use up its allocation."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from types import FrameType

from lars.comm.world import World
from lars.errors import EXIT_STALLED

# A rank that waits for others is given this many times the limit, so that the stalled rank itself reports first.
_PATIENCE_WHILE_WAITING = 1.5


class Watchdog:
    """Ends the job and logs the Python stacks of this rank if it makes no progress for too long.

    A separate thread watches, so a read, a lock or a collective that blocks does not stop it. If the whole process is
    stopped or its host is down, the watchdogs of the other ranks end the job, because those ranks wait for it.
    """

    def __init__(self, world: World, seconds: float) -> None:
        """Start to watch. `seconds` is the longest time without a heartbeat; 0 means no limit."""
        self.world, self.seconds = world, seconds
        self.heartbeat("starting")
        self._over = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def heartbeat(self, phase: str) -> None:
        """Record progress: this rank begins a phase, such as a step, a validation batch or a checkpoint."""
        self.phase, self.since = phase, time.monotonic()

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.seconds / 10)):
            idle = time.monotonic() - self.since
            if idle < self.seconds:
                continue
            frame = sys._current_frames()[threading.main_thread().ident or 0]
            waits = _waits_for_others(self.world, frame)
            if not waits or idle >= _PATIENCE_WHILE_WAITING * self.seconds:
                self._end(idle, waits)

    def _end(self, idle: float, waits: bool) -> None:
        what = (
            "has waited for the other ranks: one of them has stalled or cannot be reached"
            if waits
            else "has stalled"
        )
        where = f"rank {self.world.rank} of {self.world.size}, {socket.gethostname()}"
        with contextlib.suppress(OSError):  # the disk of the log may be full
            print(
                f"{os.path.basename(sys.argv[0])}: error ({where}): this rank {what}; it made no progress for "
                f"{idle:.0f} s in: {self.phase}. Its stack traces follow; --stall-seconds sets the limit",
                file=sys.stderr,
            )
            faulthandler.dump_traceback(sys.stderr)
        self.world.abort(EXIT_STALLED)


def _waits_for_others(world: World, frame: FrameType | None) -> bool:
    """Whether a stack is inside the backend, where ranks wait for each other."""
    while frame is not None:
        if world.is_waiting(frame):
            return True
        frame = frame.f_back
    return False
