"""Files that are either complete or absent, even after the machine crashes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp-"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears at `path` only after it is complete and on disk.

    The content is written to a temporary file in the same folder, flushed to disk and renamed. The folder is flushed
    to disk as well. An interruption leaves the old file unchanged.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def report(line: str) -> None:
    """Print a line at once. If it cannot be written, for example on a full disk, it is lost and training continues."""
    with contextlib.suppress(OSError):
        print(line, flush=True)
