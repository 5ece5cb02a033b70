"""Checkpoint files. They are written completely or not at all, verified when read, and hold no code."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import torch

from lars.errors import CheckpointError
from lars.run.files import TEMPORARY, atomic_write

FORMAT = 1
_MARK = b"CRC\0"
_TRAILER_BYTES = 8
_PIECE = 16 << 20  # bytes per read


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) with a checksum.

    ``torch.load`` can read the file. Its last 8 bytes follow the zip archive and hold a CRC-32.
    """
    with atomic_write(path) as file:
        checked = _Checksummed(file)
        try:
            torch.save({"format": FORMAT} | state, checked)  # type: ignore[arg-type]
        except RuntimeError as error:
            # torch's writer replaces the file system's error with its own.
            raise checked.failure or error from None
        file.write(_trailer(checked.crc))


class _Checksummed:
    """A file that computes a checksum of what is written, so a large checkpoint needs no copy in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.crc = file, 0
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        self.crc = zlib.crc32(data, self.crc)
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self.file.flush()


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint that `save` wrote onto the CPU.

    Raises:
        CheckpointError: The file is missing or damaged, has an unknown format, or holds anything except tensors and
            plain values. The message does not name the file.
    """
    try:
        _verify(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(str(error)) from error
    except CheckpointError:
        raise
    except Exception as error:  # the unpickler of torch.load raises many types
        cause = str(error).splitlines()[0]
        raise CheckpointError(f"not a checkpoint of this program ({cause})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError("written in a format that this version cannot read")
    return state


def _verify(path: Path) -> None:
    """Check a file against the checksum at its end."""
    left, crc = path.stat().st_size - _TRAILER_BYTES, 0
    with open(path, "rb") as file:
        while left > 0:
            piece = file.read(min(left, _PIECE))
            if not piece:
                break
            left, crc = left - len(piece), zlib.crc32(piece, crc)
        if left or file.read() != _trailer(crc):
            raise CheckpointError("damaged (its checksum does not match)")


def is_ours(path: Path) -> bool:
    """Whether a file ends with the checksum of `save`. False if it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(-_TRAILER_BYTES, os.SEEK_END)
            return file.read(len(_MARK)) == _MARK
    except OSError:
        return False


def newest_first(folder: Path, file_format: str) -> list[tuple[tuple[int, int], Path]]:
    """((finished epochs, further steps), path) of each checkpoint in `folder`, newest first."""
    place = r"(\d+)(?:\+(\d+))?"
    pattern = re.compile(place.join(re.escape(part) for part in file_format.split("{epoch}", 1)))
    found = ((pattern.fullmatch(path.name), path) for path in folder.glob("*"))
    return sorted((((int(m[1]), int(m[2] or 0)), path) for m, path in found if m), reverse=True)


def rotate(
    folder: Path,
    file_format: str,
    *,
    newest: tuple[int, int],
    keep: int,
    keep_also: Collection[tuple[int, int]] = (),
) -> None:
    """Delete old checkpoints, those beyond the newest one, and the remains of interrupted writes.

    A checkpoint beyond the newest one is damaged: the job would have resumed from it. It must not take a place.

    Args:
        folder: The run folder.
        file_format: File name of a checkpoint with ``{epoch}``.
        newest: (finished epochs, further steps) of the checkpoint that was just written.
        keep: Number of newest checkpoints to keep.
        keep_also: (finished epochs, further steps) of other checkpoints to keep.
    """
    found = newest_first(folder, file_format)
    kept = [place for place, _ in found if place <= newest][:keep]
    for place, path in found:
        if place not in kept and (place > newest or place not in keep_also):
            path.unlink()
    for path in folder.glob(f"{TEMPORARY}*"):
        path.unlink()


def _trailer(crc: int) -> bytes:
    return _MARK + crc.to_bytes(4, "little")
