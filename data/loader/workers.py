"""The process that loader workers are forked from, which must start before MPI.

This module needs the standard library only, so that a script can call `start_forkserver` before it
imports anything that uses MPI.
"""

from __future__ import annotations

import multiprocessing
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
