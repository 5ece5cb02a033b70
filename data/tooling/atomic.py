"""Files and folders that are there whole or not at all, after a crash of the machine too."""

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

# What a name ends in until all of it is on the disk.
_UNFINISHED = re.compile(r"\.unfinished\.\w+$")


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`, which takes the name when the block ends well.

    It is on the disk by then. Two processes may write the same path; the last wins.
    """
    temporary = f"{path}.unfinished.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            _lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # before the lock ends
        _sync(os.path.dirname(os.path.abspath(path)))
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


@contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Make a temporary folder beside `path`, which takes the name when the block ends well.

    All in it is on the disk by then.

    Raises:
        OSError: Among others, if `path` is there already and not empty.
    """
    parent, name = os.path.split(os.path.abspath(path))
    os.makedirs(parent, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f"{name}.unfinished.", dir=parent)
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        _lock(descriptor)  # until this process ends, however that goes
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        # After all has been written, so that the file system may write it in one go.
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


def _lock(descriptor: int, without: bool = False) -> bool:
    """Lock an open file or folder: False if another process has, `without` if there are no locks.

    Some file systems have none, and folders of network file systems are locked for this machine.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return without
    return True


class Busy(DataError):
    """Another process works in the folder that a flag names."""

    exit_code = 2


@contextmanager
def alone(folder: str) -> Iterator[None]:
    """Make `folder` if need be, and keep other processes that ask out of it during the block.

    Raises:
        Busy: Another is in it. (Unnoticed from another machine, and where there are no locks.)
    """
    made = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not _lock(descriptor, without=True):
            raise Busy(f"another run is at work in {folder}; let it end first, or name another")
        yield
    finally:
        os.close(descriptor)
        if made:
            with suppress(OSError):  # unless something is in it now
                os.rmdir(folder)


def sweep_beside(path: str) -> None:
    """Remove what killed runs of `new_folder(path)` left, but not what a running one is making."""
    parent, name = os.path.split(os.path.abspath(path))
    if os.path.isdir(parent):
        _sweep(parent, f"{name}.unfinished.", without=False)


def sweep(folder: str) -> None:
    """Remove what killed runs left unfinished in `folder`, but not what a running one is making.

    On a file system without locks, nobody must be writing there.
    """
    _sweep(folder, "", without=True)


def _sweep(folder: str, prefix: str, without: bool) -> None:
    for name in os.listdir(folder):
        if not name.startswith(prefix) or not is_unfinished(name):
            continue
        path = os.path.join(folder, name)
        is_folder = os.path.isdir(path)
        try:  # network file systems lock files only for who may write them
            descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        except FileNotFoundError:  # it has its name by now
            continue
        if _lock(descriptor, without):
            if is_folder:
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)
        os.close(descriptor)


def is_unfinished(name: str) -> bool:
    """Say whether a file or folder has a name that `replacing` or `new_folder` gives first."""
    return _UNFINISHED.search(name) is not None


def _sync(path: str) -> None:
    """Bring a file, or the names in a folder, to the disk."""
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
    read back as Python has it.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False)
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace") + b"\n")


def read_json(path: str) -> Any:
    """Read a JSON file; None if it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None
