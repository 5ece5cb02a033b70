"""Checkpoint files: written completely or not at all, verified when read, made of tensors and plain values only."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from lars.errors import CheckpointError
from lars.run.files import TEMPORARY, atomic_write

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) with a checksum.

    ``torch.load`` reads the file as it is; the last 8 bytes, after the end of the zip archive, hold our CRC-32.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT} | state, buffer)
    payload = buffer.getbuffer()
    with atomic_write(path) as file:
        file.write(payload)
        file.write(_trailer(payload))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint that `save` wrote, onto the CPU.

    Raises:
        CheckpointError: The file is missing or damaged, has another format, or holds anything but tensors and plain
            values.
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
    except Exception as error:  # the unpickler of torch.load raises many types
        cause = str(error).splitlines()[0]
        raise CheckpointError(f"not a checkpoint of this program ({cause})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError("written in a format that this version does not read")
    return state


def newest_first(folder: Path, file_format: str) -> list[tuple[tuple[int, int], Path]]:
    """((finished epochs, steps beyond them), path) of each checkpoint in `folder`, the last one first."""
    place = r"(\d+)(?:\+(\d+))?"
    pattern = re.compile(place.join(re.escape(part) for part in file_format.split("{epoch}", 1)))
    found = ((pattern.fullmatch(path.name), path) for path in folder.glob("*"))
    return sorted((((int(m[1]), int(m[2] or 0)), path) for m, path in found if m), reverse=True)


def rotate(
    folder: Path, file_format: str, *, keep: int, keep_also: Collection[tuple[int, int]] = ()
) -> None:
    """Delete all but the newest `keep` checkpoints and the places `keep_also`, and what interrupted writes left."""
    for place, path in newest_first(folder, file_format)[keep:]:
        if place not in keep_also:
            path.unlink()
    for path in folder.glob(f"{TEMPORARY}*"):
        path.unlink()


def _trailer(payload: memoryview) -> bytes:
    return b"CRC\0" + zlib.crc32(payload).to_bytes(4, "little")
