"""The lock that allows only one job per run folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lars.errors import CheckpointError, UsageError

# How long to wait for another job in the folder. NFS frees the locks of a crashed host after 90 s.
LOCK_SECONDS = 120.0


@contextlib.contextmanager
def locked(
    folder: Path,
    while_waiting: Callable[[], None] = lambda: None,
    seconds: float | None = None,
    flag: str = "--run-name",
) -> Iterator[None]:
    """Create the run folder, and keep other jobs out of it during the block.

    The kernel frees the lock when this process ends for any reason. On a file system without locks, nothing is locked.

    Args:
        folder: The run folder.
        while_waiting: Called repeatedly while another job holds the folder.
        seconds: How long to wait for that job; None: two minutes.
        flag: The flag that chose the folder, for the error message.

    Raises:
        CheckpointError: The folder cannot be created or written.
        UsageError: Another job holds the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(
            f"--log-dir: {folder} cannot be written: {error}; choose a writable folder"
        ) from error
    try:
        _acquire(lock, folder, while_waiting, LOCK_SECONDS if seconds is None else seconds, flag)
        with contextlib.suppress(OSError):  # on a full disk the lock works without the owner's name
            os.truncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(lock)


def holder(folder: Path) -> str | None:
    """The job that holds the run folder now, or None. Nothing is written."""
    try:
        lock = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # freed when the file is closed
    except BlockingIOError:
        return _owner(lock)
    except OSError:  # the file system has no locks
        return None
    finally:
        os.close(lock)
    return None


def _owner(lock: int) -> str:
    return os.pread(lock, 1000, 0).decode(errors="replace") or "another process"


def _acquire(
    lock: int, folder: Path, while_waiting: Callable[[], None], seconds: float, flag: str
) -> None:
    deadline, reported = time.monotonic() + seconds, False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _owner(lock)
            if time.monotonic() > deadline:
                raise UsageError(
                    f"{flag}: {folder} is in use by {owner}; wait until that job ends, or choose another name"
                ) from error
            if not reported:
                print(f"{folder} is in use by {owner}; waiting until it is free", flush=True)
            reported = True
            while_waiting()
            time.sleep(0.2)
        except OSError:  # the file system has no locks
            return None
