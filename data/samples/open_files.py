"""Pieces of many files: as few files as allowed are open at a time."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence

from data import SetError
from data.tooling.limits import TOO_MANY_FILES, open_file_limit, too_many_open_files

# Open files per process. The usual limit is 1,024, and loaders need some for their batches.
_OPEN_FILES = 256


class OpenFiles:
    """Reads pieces of files, which it opens when they are needed.

    It belongs to one thread of one process: an owner that is copied or pickled makes a new one.

    Args:
        paths: Paths of the files.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, file: int, offset: int, size: int) -> bytes:
        """Return `size` bytes of a file, or fewer at its end.

        Raises:
            SetError: Too many files are open.
            OSError: The file cannot be read.
        """
        return os.pread(self._descriptor(file), size, offset)

    def _descriptor(self, file: int) -> int:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        if len(self._open) >= min(_OPEN_FILES, open_file_limit() // 4):
            os.close(self._open.popitem(last=False)[1])
        try:
            self._open[file] = os.open(self.paths[file], os.O_RDONLY)
        except OSError as error:
            if error.errno in TOO_MANY_FILES:
                raise too_many_open_files() from error
            raise
        return self._open[file]

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """Close the files. When Python ends, it may have cleared the name `os` before."""
        for descriptor in getattr(self, "_open", {}).values():
            close(descriptor)


def whole(piece: bytes, size: int) -> bytes:
    """Return the piece of a file if it has `size` bytes.

    Raises:
        SetError: The file ended before that.
    """
    if len(piece) < size:
        raise SetError("the file is shorter than its index file says; copy it again")
    return piece
