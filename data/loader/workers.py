"""Worker processes: how loaders start them before MPI, and how they end.

This module needs the standard library only, so that a script can call `start_forkserver` before it
imports anything that uses MPI.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing import forkserver

# What a worker needs and nothing more: torch, numpy and the decoder, but not Horovod, MPI or
# torchvision.
_PRELOAD = ["data.loader.torch_loader"]


def start_forkserver() -> None:
    """Start the process that loader workers are forked from, before MPI is initialised.

    Forking a process that has initialised MPI or CUDA corrupts it. The fork server has initialised
    neither. It has already imported torch, so a worker starts in milliseconds and shares those
    pages. Two workers give their first batch after 0.6 s, most of which is the import of the main
    module; if they are spawned it takes 2.2 s (on 2 cores; python -m benchmarks.loader --start
    --workers 2). A second call does nothing. Workers import the main module again, so a script must
    keep its work under ``if __name__ == "__main__"`` and its heavy imports inside functions.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    forkserver.ensure_running()


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
