"""Compressed tars and record files become plain ones, in which images can be read by position."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from data import DataError
from data.layouts import Found
from data.samples.tar_members import compression_of
from data.tooling.atomic import locked, replacing, sweep
from data.tooling.pool import Pool

_ENDINGS = (".gz", ".bz2", ".xz")

# Compressions that Python can read, with the function that opens such a file.
READABLE: dict[str, Callable[[str], Any]] = {
    "gzip": gzip.open,
    "bzip2": bz2.open,
    "xz": lzma.open,
}

# What these modules raise for damaged files.
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class File:
    """Task: one compressed file, and the plain file to write."""

    packed: str
    plain: str


def kind_of(path: str) -> str | None:
    """Return the compression of a file by its first bytes; None if it is not compressed."""
    with open(path, "rb") as file:
        return compression_of(file.read(6))


def open_packed(path: str) -> IO[bytes]:
    """Open a file to read what it holds, decompressed if it is compressed.

    Raises:
        DataError: It is compressed in a way that Python cannot read.
    """
    kind = kind_of(path)
    if kind is None:
        return open(path, "rb")
    if kind not in READABLE:
        raise DataError(f"{path} is compressed with {kind}; make a plain tar of it first")
    packed: IO[bytes] = READABLE[kind](path)
    return packed


def decompressed(content: bytes, name: str) -> bytes:
    """Return what a compressed file holds, given all its bytes; `name` is for the error."""
    kind = compression_of(content) or ""
    unpack = {"gzip": gzip.decompress, "bzip2": bz2.decompress, "xz": lzma.decompress}.get(kind)
    if unpack is None:
        raise DataError(f"{name} is compressed with {kind}; make a plain tar of it first")
    return unpack(content)


def decompress(task: File) -> int:
    """Write one plain file; return its size in bytes.

    Raises:
        DataError: The file is damaged.
    """
    try:
        with open_packed(task.packed) as packed, replacing(task.plain) as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:  # a full disk, for example
            raise
        raise DataError(f"{task.packed} is damaged ({error}); download it again") from error
    return os.path.getsize(task.plain)


def packed_files(found: Found) -> list[str]:
    """Return the compressed files of a set of large files; [] for other layouts."""
    if found.layout not in ("web_dataset", "flat_records"):
        return []
    return [path for path in (found.train or []) + (found.val or []) if kind_of(path) is not None]


def decompress_all(found: Found, folder: str, pool: Pool) -> None:
    """Write all files of a set under `folder`, decompressed; files that are plain are copied."""
    tasks = []
    for path in (found.train or []) + (found.val or []):
        name = os.path.relpath(path, found.path)
        stem, ending = os.path.splitext(name)
        plain = stem if ending in _ENDINGS else f"{stem}.tar" if ending == ".tgz" else name
        tasks.append(File(path, os.path.join(folder, plain)))
    os.makedirs(folder, exist_ok=True)
    with locked(folder):
        for place in {os.path.dirname(task.plain) for task in tasks}:
            os.makedirs(place, exist_ok=True)
            sweep(place)
        left = [task for task in tasks if not os.path.exists(task.plain)]
        for _ in pool.work(decompress, left, "files"):
            pass
        for name in sorted(os.listdir(found.path)):
            path = os.path.join(found.path, name)
            if name.endswith(".txt") and os.path.isfile(path):  # names of the classes
                shutil.copy(path, folder)
    print(f"{folder}: {len(tasks):,} files, {len(left):,} of them written now")


def packed_size(found: Found) -> int:
    """Return the bytes of a set's files as they are now."""
    return sum(os.path.getsize(path) for path in (found.train or []) + (found.val or []))
