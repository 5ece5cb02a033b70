"""The index of WebDataset's tar files: where each image lies, and its label."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from data import SetError
from data.samples.index_store import Tables
from data.samples.listing import EXTENSIONS
from data.samples.shard_names import unreadable
from data.samples.tar_members import compression_of, plain_files

_WNID = re.compile(r"(?:.*/)?(n\d{8})_")


@dataclass
class _Sample:
    """The members of one sample that were found so far."""

    image: str | None = None
    offset: int = 0
    size: int = 0
    label: int | None = None


def index_tar(path: str) -> dict[str, list[Any]]:
    """Find the images and labels in one tar.

    Returns:
        The columns ``name`` (of the image in the tar), ``offset``, ``size`` and ``label``.

    Raises:
        SetError: The tar is damaged, compressed or cut short, or a sample lacks its image or label.
    """
    samples: dict[str, _Sample] = {}
    try:
        with open(path, "rb") as file:
            refuse_compressed_tar(path, file)
            for member in plain_files(file, os.path.getsize(path)):
                _add(samples, member, file)
    except SetError as error:
        raise SetError(f"{path}: {error}") from error
    except OSError as error:
        raise unreadable(path, error) from error
    except tarfile.TarError as error:
        raise SetError(f"{path} is damaged ({error}); download or copy it again") from error
    if not samples:
        raise SetError(f"{path} holds no images; download or copy it again")
    for key, sample in samples.items():
        if sample.image is None or sample.label is None:
            missing = "image (.jpg, .jpeg, .png)" if sample.image is None else "label (.cls, .json)"
            raise SetError(f"{path}: sample {key} has no {missing}")
    rows = samples.values()
    return {
        "name": [row.image for row in rows],
        "offset": [row.offset for row in rows],
        "size": [row.size for row in rows],
        "label": [row.label for row in rows],
    }


def refuse_compressed_tar(path: str, file: BinaryIO) -> None:
    """Raise SetError if a tar is compressed, so that a member has no position in it."""
    kind = compression_of(file.read(6))
    file.seek(0)
    if kind:
        raise SetError(
            f"the tar is compressed with {kind}, so single images cannot be read from it; unpack "
            f"all of them: python -m data.prepare --data {os.path.dirname(path) or '.'} --out NEW"
        )


def _add(samples: dict[str, _Sample], member: tarfile.TarInfo, tar: BinaryIO) -> None:
    """Add a member to its sample; members that are neither image nor label do not count."""
    folder, _, base = member.name.rpartition("/")
    stem, _, ending = base.partition(".")
    kind = ending.lower().rpartition(".")[2]
    is_image = f".{kind}" in EXTENSIONS
    if not stem or not (is_image or kind in ("cls", "json")):
        return
    key = f"{folder}/{stem}" if folder else stem
    sample = samples.setdefault(key, _Sample())
    if is_image:
        if sample.image is not None:
            raise SetError(f"sample {key} has two images, {sample.image} and {member.name}")
        sample.image, sample.offset, sample.size = member.name, member.offset_data, member.size
        return
    position = tar.tell()
    tar.seek(member.offset_data)
    content = tar.read(member.size)
    tar.seek(position)
    label = _label(content, kind, member.name)
    if label is not None and sample.label not in (None, label):
        raise SetError(f"sample {key} has two labels, {sample.label} and {label}")
    sample.label = label if label is not None else sample.label


def _label(content: bytes, kind: str, name: str) -> int | None:
    """Return the label in a member; None if a JSON file has no entry for it."""
    try:
        value: Any = content.decode() if kind == "cls" else json.loads(content).get("label")
        if value is None:
            return None
        number = int(value)
        if isinstance(value, float) and number != value:
            raise ValueError("a fraction")
        return int(np.int64(number))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        shown = content[:40].decode(errors="replace").strip()
        raise SetError(
            f"{name} holds {shown!r}; labels must be integers from 0 (in .cls, or as the entry "
            "label in .json)"
        ) from error


def join_tables(parts: Iterable[dict[str, list[Any]]]) -> Tables:
    """Return the index of several tars."""
    parts = list(parts)
    rows = [row for part in parts for row in zip(part["name"], part["label"], strict=True)]
    encoded = [os.fsencode(name) for name, _ in rows]
    return {
        "tar": np.repeat(np.arange(len(parts)), [len(part["name"]) for part in parts]),
        "offset": np.array([x for part in parts for x in part["offset"]], dtype=np.int64),
        "size": np.array([x for part in parts for x in part["size"]], dtype=np.int64),
        "label": np.array([label for _, label in rows], dtype=np.int64),
        "classes": np.array(_wnids(rows)),
        "names": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "ends": np.cumsum([len(name) for name in encoded]),
    }


def _wnids(rows: Iterable[tuple[str, int]]) -> list[str]:
    """Return the WordNet ID of each label in order; [] unless each image's name begins with its own.

    Args:
        rows: (name, label) of each image.
    """
    found: dict[int, str] = {}
    for name, label in rows:
        match = _WNID.match(name)
        if match is None or found.setdefault(label, match.group(1)) != match.group(1):
            return []
    return (
        [found[label] for label in sorted(found)] if len(set(found.values())) == len(found) else []
    )
