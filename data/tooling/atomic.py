"""Files and folders that appear complete or not at all, even if the machine crashes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from data import DataError

# Ending of a name until all of its content is on the disk.
_UNFINISHED = re.compile(r"\.unfinished\.\w+$")


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Open a temporary file next to `path`, and rename it to `path` when the block succeeds.

    Its content is on the disk before it gets the name. Two processes may write the same path; the
    last one wins.
    """
    temporary = f"{path}.unfinished.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            _lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # while it is still locked
        _sync(os.path.dirname(os.path.abspath(path)))
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


@contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Make a temporary folder next to `path`, and rename it to `path` when the block succeeds.

    Everything in it is on the disk before it gets the name.

    Raises:
        OSError: For example, `path` already exists and is not empty.
    """
    parent, name = os.path.split(os.path.abspath(path))
    os.makedirs(parent, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f"{name}.unfinished.", dir=parent)
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        _lock(descriptor)  # until this process ends, for any reason
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        # Sync after everything is written, so that the file system can write it in one pass.
        for folder, _, files in os.walk(temporary, topdown=False):
            for file in files:
                _sync(os.path.join(folder, file))
            _sync(folder)
        os.rename(temporary, path)
        _sync(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _lock(descriptor: int, if_unsupported: bool = False) -> bool:
    """Lock an open file or folder; return False if another process holds the lock.

    Some file systems have no locks; then the result is `if_unsupported`. On network file systems
    the lock of a folder holds for this machine only.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return if_unsupported
    return True


class Busy(DataError):
    """Another process is working in the folder that a flag names."""

    exit_code = 2


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Lock `folder` during the block, and create it if it does not exist.

    Raises:
        Busy: Another process holds the lock. A process on another machine is not noticed, and
            neither is one on a file system without locks.
    """
    created = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not _lock(descriptor, if_unsupported=True):
            raise Busy(
                f"another run is using {folder}; wait until it has ended, or name another folder"
            )
        yield
    finally:
        os.close(descriptor)
        if created:
            with suppress(OSError):  # it is kept if it is no longer empty
                os.rmdir(folder)


def sweep_beside(path: str) -> None:
    """Remove what killed runs left of `new_folder(path)` and `replacing(path)`.

    What a running process writes is kept.
    """
    parent, name = os.path.split(os.path.abspath(path))
    if os.path.isdir(parent):
        _sweep(parent, f"{name}.unfinished.", if_unsupported=False)


def sweep(folder: str) -> None:
    """Remove unfinished files and folders of killed runs in `folder`, but not those of running ones.

    On a file system without locks, make sure that no other process is writing there.
    """
    _sweep(folder, "", if_unsupported=True)


def _sweep(folder: str, prefix: str, if_unsupported: bool) -> None:
    for name in os.listdir(folder):
        if not name.startswith(prefix) or not is_unfinished(name):
            continue
        path = os.path.join(folder, name)
        is_folder = os.path.isdir(path)
        try:  # network file systems lock files only if they are open for writing
            descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        except FileNotFoundError:  # it has been renamed by now
            continue
        if _lock(descriptor, if_unsupported):
            if is_folder:
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)
        os.close(descriptor)


def is_unfinished(name: str) -> bool:
    """Whether this is a temporary name that `replacing` or `new_folder` gives."""
    return _UNFINISHED.search(name) is not None


def _sync(path: str) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str, value: Any) -> None:
    """Write `value` as indented JSON.

    A file name that is not UTF-8 is written with JSON's escapes (``\\udcff`` for the byte ff), and
    `read_json` returns it as Python represents it.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False)
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace") + b"\n")


def read_json(path: str) -> Any:
    """Read a JSON file; return None if it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None
