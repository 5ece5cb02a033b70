"""Lets rank 0 call the other ranks, which wait without communicating, so that they do not disturb a measurement.

Rank 0 changes a file again and again. The others wait until it changes: a file of an earlier run does not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAME, _SECONDS = "ranks-may-start", 0.5


@contextmanager
def called(folder: Path) -> Iterator[None]:
    """Call the other ranks until the end of the with block."""
    ended = threading.Event()

    def call() -> None:
        while not ended.wait(_SECONDS):
            (folder / _NAME).write_text(f"{time.time()}")

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        (folder / _NAME).unlink(missing_ok=True)


def wait(folder: Path, deadline: float) -> bool:
    """Wait for the call of rank 0. Returns whether it came before `deadline`, a time of `time.monotonic`."""
    first = _content(folder)
    while (now := time.monotonic()) < deadline:
        if _content(folder) not in ("", first):
            return True
        time.sleep(min(_SECONDS / 2, deadline - now))
    return False


def _content(folder: Path) -> str:
    try:
        return (folder / _NAME).read_text()
    except FileNotFoundError:
        return ""
