"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`, which takes the name when the block ends well.

    It is on the disk by then. Two processes may write the same path; the last wins.
    """
    temporary = f"{path}.tmp.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def write_json(path: str, value: Any) -> None:
    """Write `value` as indented JSON."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def read_json(path: str) -> Any:
    """Read a JSON file; None if it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None
