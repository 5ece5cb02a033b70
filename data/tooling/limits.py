"""Limits of the machine that loaders and tools can meet: open files and shared memory."""

from __future__ import annotations

import errno
import os
import resource
import sys
from typing import TYPE_CHECKING

from data import SetError

if TYPE_CHECKING:
    from torch import Tensor

TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)

# Both of torch's sharing strategies keep tables and the workers' batches here.
SHARED_MEMORY = "/dev/shm"

# Files that a process opens besides those of its workers: libraries, logs, sockets of MPI.
_OWN_FILES = 64


def share(tensor: Tensor) -> Tensor:
    """Move a tensor to shared memory, where the worker processes of the rank find it.

    Raises:
        SetError: It does not fit.
    """
    try:
        return tensor.share_memory_()
    except RuntimeError as error:
        if "Too many open files" in str(error):
            raise too_many_open_files() from error
        raise no_shared_memory("a table of the samples", tensor.nbytes) from error


def no_shared_memory(what: str, needed: int = 4096) -> SetError:
    """Return the error for shared memory that is too small; a page is the least that is needed."""
    return SetError(
        f"{what} needs {in_units(needed)} of {SHARED_MEMORY}, but only "
        f"{in_units(free_shared_memory() or 0)} are free; enlarge it "
        "(docker run --shm-size, mount -o remount,size=)"
    )


def in_units(size: int) -> str:
    """Return a number of bytes as text."""
    return f"{size / 1e6:,.0f} MB" if size > 5e5 else f"{size / 1e3:.1f} kB"


def free_shared_memory() -> int | None:
    """Return the free bytes of shared memory; None where that is not a file system."""
    try:
        memory = os.statvfs(SHARED_MEMORY)
    except OSError:  # not Linux
        return None
    return memory.f_bavail * memory.f_frsize


def allow_open_files(workers: int, each: int) -> None:
    """Raise the soft limit of open files as far as `workers` processes need, if the hard one allows.

    Args:
        workers: Number of processes.
        each: Files that this process opens for one of them.

    Raises:
        SetError: The hard limit is too low.
    """
    needed = _OWN_FILES + each * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SetError(
            f"--workers {workers} needs {needed} open files, but the limit is {hard}; raise it "
            f"(ulimit -n {needed}; docker run --ulimit nofile={needed}), or "
            "lower --workers"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def open_file_limit() -> int:
    """Return how many files this process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def too_many_open_files() -> SetError:
    """Return the error for a process that has reached its limit of open files."""
    return SetError(
        f"too many files are open (the limit is {open_file_limit()}); raise the limit (ulimit -n 4096), or lower "
        "--workers"
    )
