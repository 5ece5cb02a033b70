"""How worker processes end, those of the loaders and those of the tools. Standard library only."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Signals that ask a job to stop. Terminals and batch systems send them to all of its processes.
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def end_with_parent(_worker: int = 0) -> None:
    """End this worker process as soon as the process that it works for is gone, for any reason.

    A worker that is left behind waits forever and keeps the job's output and its shared memory
    open: `job | tee log` would never return. The fork server cannot end its workers: it learns that
    the trainer is gone from a pipe which the workers keep open as well.
    """
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block the signals that ask to stop in processes that start during the block.

    They and all their children keep the signals blocked.
    """
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def end_when_parent_asks() -> None:
    """End this worker process if its parent sends SIGTERM; ignore SIGTERM from anyone else.

    The signal must be blocked (`stop_signals_blocked`). Without this, a worker would die before the
    trainer has saved, or could not be ended by it at all.
    """
    parent = multiprocessing.parent_process()

    def wait() -> None:
        while True:
            sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
            if parent is None or sender == parent.pid:
                os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
