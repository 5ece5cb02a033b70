"""Worker processes: how loaders start theirs beside MPI, and how all end.

Standard library only, so that a script can call `start_forkserver` before it imports anything that
touches MPI.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing import forkserver

# What a worker needs and nothing else: torch, numpy and the decoder, but neither Horovod nor MPI
# nor torchvision.
_PRELOAD = ["data.loading"]


def start_forkserver() -> None:
    """Start the process that loader workers are forked from, before MPI is initialised.

    Forking a process that has initialised MPI or CUDA corrupts it; the fork server has done
    neither, and since it has imported torch already, each worker starts in milliseconds and shares
    those pages: two give their first batch after 0.6 s, of which most is the main module's import,
    and 2.2 s if they are spawned (on 2 cores; python -m benchmarks.loader --start --workers 2). A
    second call does nothing. Workers import the main module anew, so a script keeps its work under
    ``if __name__ == "__main__"`` and its heavy imports inside.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    forkserver.ensure_running()


def end_with_parent(_worker: int = 0) -> None:
    """End this worker process as soon as the one that it works for is gone, however that went.

    A worker that is left waits for ever, and holds the job's output and its shared memory: `job | tee log` would never
    return. The fork server is told of its end by its children, so it cannot tell them.
    """
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
