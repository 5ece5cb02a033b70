"""Checkpoints: written whole or not at all, checked when read, and made of nothing but tensors and plain values."""

from __future__ import annotations

import contextlib
import io
import os
import re
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

import torch

FORMAT = 1
_TEMPORARY = ".tmp-"


class CheckpointError(RuntimeError):
    """No usable checkpoint; the message says what was tried and what to do."""

    exit_code = 4


@contextlib.contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears at `path` only when it is complete and on the disk.

    It is written beside its place, synchronised, and renamed; the folder is synchronised too. Whatever
    interrupts that leaves the old file as it was.
    """
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
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


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) with a checksum.

    The file is one that ``torch.load`` reads as it is; the last 8 bytes, after the zip archive's end, are our CRC-32.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT} | state, buffer)
    payload = buffer.getbuffer()
    with writing(path) as file:
        file.write(payload)
        file.write(_trailer(payload))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint that `save` wrote, onto the CPU.

    Raises:
        CheckpointError: The file is missing, damaged, of another format, or holds anything but tensors
            and plain values.
    """
    try:
        return loads(path.read_bytes())
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def loads(content: bytes) -> dict[str, Any]:
    """Read a checkpoint from the bytes of its file."""
    payload = memoryview(content)[:-8]
    if len(content) < 8 or bytes(content[-8:]) != _trailer(payload):
        raise CheckpointError("damaged (its checksum does not match)")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler stumbles over
        cause = str(error).splitlines()[0]
        raise CheckpointError(f"not a checkpoint of this program ({cause})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError("of another format than this version reads")
    return state


def newest_first(folder: Path, file_format: str) -> list[tuple[tuple[int, int], Path]]:
    """((finished epochs, steps beyond them), path) of the checkpoints in `folder`, the last one first."""
    place = r"(\d+)(?:\+(\d+))?"
    pattern = re.compile(place.join(re.escape(part) for part in file_format.split("{epoch}", 1)))
    found = ((pattern.fullmatch(path.name), path) for path in folder.glob("*"))
    return sorted((((int(m[1]), int(m[2] or 0)), path) for m, path in found if m), reverse=True)


def rotate(
    folder: Path, file_format: str, *, keep: int, spared: Collection[tuple[int, int]] = ()
) -> None:
    """Delete all but the newest `keep` checkpoints and the `spared` places, and what interrupted writes left."""
    for place, path in newest_first(folder, file_format)[keep:]:
        if place not in spared:
            path.unlink()
    for path in folder.glob(f"{_TEMPORARY}*"):
        path.unlink()


def _trailer(payload: memoryview) -> bytes:
    return b"CRC\0" + zlib.crc32(payload).to_bytes(4, "little")
