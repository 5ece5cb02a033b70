"""The process that loader workers are forked from, which must start before MPI.

This module needs the standard library only, so that a script can call `start_forkserver` before it
imports anything that uses MPI.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

from data.tooling.limits import allow_open_files
from data.tooling.processes import stop_signals_blocked

# What a worker needs and nothing more: torch, numpy and the decoder, but not Horovod, MPI or
# torchvision.
_PRELOAD = ["data.loader.torch_loader"]

# Pipes, sockets and batches in flight of one worker of each of the two loaders: 14 were counted.
_FILES_PER_WORKER = 16

_ROOT = str(Path(__file__).resolve().parents[2])


def check_open_files(workers: int) -> None:
    """Raise SetError if the limit of open files is too low for so many workers."""
    allow_open_files(workers, _FILES_PER_WORKER)


def start_forkserver(modules: Sequence[str] = ()) -> None:
    """Start the process that loader workers are forked from, before MPI is initialised.

    Forking a process that has initialised MPI or CUDA corrupts it. The fork server has initialised
    neither. It has already imported torch, so a worker starts in milliseconds and shares those
    pages. Two workers give their first batch after 0.6 s, most of which is the import of the main
    module; if they are spawned it takes 2.2 s (on 2 cores; python -m benchmarks.loader --start
    --workers 2). A second call does nothing. Workers import the main module again, so a script must
    keep its work under ``if __name__ == "__main__"`` and its heavy imports inside functions.

    A terminal and a batch system send their signals to all processes of a job. The server and its
    workers ignore those that ask to stop, so that the trainer can finish its step and save.

    Args:
        modules: Further modules that the workers need.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOAD, *modules])
    with stop_signals_blocked():
        resource_tracker.ensure_running()  # this unblocks some of them here
    with stop_signals_blocked(), _importing_from(_ROOT):
        forkserver.ensure_running()


@contextmanager
def _importing_from(folder: str) -> Iterator[None]:
    """Let processes that start during the block import from `folder`.

    The fork server does not get this process's ``sys.path``. If it cannot import what it should
    preload, it says nothing, and each worker imports torch itself.
    """
    earlier = os.environ.copy()
    paths = [folder, *filter(None, [earlier.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ["PYTHONSAFEPATH"] = "1"  # a folder `data` in the current folder is not ours
    try:
        yield
    finally:
        for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
            if name in earlier:
                os.environ[name] = earlier[name]
            else:
                del os.environ[name]
