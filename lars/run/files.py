"""Files that are complete or absent, even after a crash of the machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp-"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears at `path` only once it is complete and on disk.

    The content is written beside `path`, synchronised, and renamed; the folder is synchronised too. Any interruption
    leaves the old file unchanged.
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
