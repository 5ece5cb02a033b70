"""How worker processes end, those of the loaders and those of the tools. Standard library only."""

from __future__ import annotations

import multiprocessing
import os
import threading


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
