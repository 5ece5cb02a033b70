"""TFRecords without index files: their index is made once, from the headers and small features."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from data import DataError, SetError
from data.samples import tfrecord
from data.samples.exclude import read_excluded, refuse_none_left
from data.samples.index_store import Tables, index_of
from data.samples.labels import refuse_labels
from data.samples.records import RecordSet
from data.samples.shard_names import refuse_incomplete, unreadable
from data.samples.tars import read_class_names

# Bytes of a record to read at first. An image is longer, and is skipped.
_HEAD = 4096


def index_records(path: str) -> dict[str, list[Any]]:
    """Find the records in one file, with their labels.

    The checksums of the lengths are verified here, and the checksum of a record when it is read for
    the first time.

    Returns:
        The columns ``offset``, ``size``, ``label`` (as in the record) and ``name`` (of the class; ""
        if the record has none), and ``first``: the label that the first class usually has in
        records with these features.

    Raises:
        SetError: The file is damaged, compressed, empty or cannot be read, or a record lacks its
            label.
    """
    try:
        return _index_records(path)
    except OSError as error:
        raise unreadable(path, error) from error


def _index_records(path: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {k: [] for k in ("offset", "size", "label", "name", "first")}
    end = os.path.getsize(path)
    offset = 0
    with open(path, "rb", buffering=_HEAD) as file:
        while offset < end:
            try:
                length = tfrecord.read_length(file, end - offset)
                label, name, first = _label(file, length)
            except (DataError, ValueError, IndexError, KeyError, struct.error) as error:
                tfrecord.refuse_compression(path)
                raise SetError(
                    f"{path}, record at byte {offset}: {error}; download or copy the file again"
                ) from error
            size = length + tfrecord.OVERHEAD
            for key, value in zip(columns, (offset, size, label, name, first), strict=True):
                columns[key].append(value)
            offset += size
            file.seek(offset)
    if not offset:
        raise SetError(f"{path} is empty: it holds no records; download or copy it again")
    return columns


def _label(file: BinaryIO, length: int) -> tuple[int, str, int]:
    """Read the label, the class name and the usual first label of a record; skip its image."""
    features = tfrecord.small_features(file, length, _HEAD)
    known = tfrecord.LABEL in features
    label = features.get(tfrecord.LABEL if known else tfrecord.TFDS_LABEL, [])
    if len(label) != 1 or not isinstance(label[0], int):
        names = ", ".join(sorted(features)) or "none"
        raise SetError(
            f"a record must hold one integer {tfrecord.LABEL} or {tfrecord.TFDS_LABEL}; this one "
            f"holds, besides long features: {names}"
        )
    name = next(iter(features.get(tfrecord.CLASS_NAME, [])), b"")
    return label[0], os.fsdecode(name) if isinstance(name, bytes) else "", int(known)


def join_indexes(parts: Iterable[dict[str, list[Any]]]) -> Tables:
    """Return the index of several files."""
    parts = list(parts)
    columns = {
        key: np.array([value for part in parts for value in part[key]])
        for key in ("offset", "size", "label", "first")
    }
    names = [name for part in parts for name in part["name"]]
    by_label: dict[int, set[str]] = {}
    for label, name in zip(columns["label"].tolist(), names, strict=True):
        by_label.setdefault(label, set()).add(name)
    certain = all(len(found) == 1 and "" not in found for found in by_label.values())
    return {
        **columns,
        "counts": np.array([len(part["offset"]) for part in parts]),
        "classes": np.array(
            [min(by_label[label]) for label in sorted(by_label)] if certain else []
        ),
    }


def make_index(
    folder: str,
    paths: Sequence[str],
    split: str,
    index_dir: str | None = None,
    index_all: Callable[..., Iterable[Any]] = map,
) -> Tables:
    """Return the index of one split; make it if that was not done before.

    The arguments and errors are those of `data.samples.tars.make_index`.
    """
    refuse_incomplete(paths)
    return index_of(
        paths,
        folder,
        f"{split}-records",
        lambda: join_indexes(index_all(index_records, paths)),
        index_dir,
    )


def open_flat_records(
    folder: str,
    paths: Sequence[str],
    split: str,
    exclude: str | None = None,
    block: int = 1,
    num_classes: int | None = None,
    label_base: int | None = None,
    index_dir: str | None = None,
) -> RecordSet:
    """Open the records of one split, and index them first if that was not done before.

    Args:
        folder: Folder of the set.
        paths: The record files.
        split: ``train`` or ``val``.
        exclude: List of records to leave out.
        block: Number of consecutive records to read in one piece.
        num_classes: Number of classes; None: what the set says, or as many as the labels show.
        label_base: Label of the first class; None: 0 if a label is 0, else what records with these
            features usually have.
        index_dir: Folder for the index; None: beside the files, or the cache.

    Raises:
        DataError: The files cannot be used.
    """
    index = make_index(folder, paths, split, index_dir)
    labels = cast("NDArray[np.int64]", index["label"])
    base = label_base
    if base is None:
        base = 0 if labels.min() == 0 else int(index["first"].max())
    names = read_class_names(folder)
    certain = num_classes is not None or bool(names)
    num_classes = num_classes or len(names) or int(labels.max()) + 1 - base
    names = names or [str(name) for name in index["classes"]]
    refuse_labels(labels - base, num_classes, base, certain)
    rows = np.column_stack([index["offset"], index["size"]]).astype(np.int64)
    tables = np.split(rows, np.cumsum(index["counts"])[:-1].astype(np.int64))
    samples = RecordSet(
        list(zip(paths, tables, strict=True)),
        num_classes,
        block,
        read_excluded(exclude, split),
        contents=" labels from 0" if base == 0 else "",
        label_base=base,
        class_names=names if len(names) == num_classes else [],
    )
    refuse_none_left(len(samples), exclude, split)
    return samples
