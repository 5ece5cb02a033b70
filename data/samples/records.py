"""TFRecords as single samples: any record by its number."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from data import DataError
from data.pixels.boxes import CropFn, Pixels, full_image
from data.pixels.decode import decode
from data.samples import tfrecord
from data.samples.exclude import read_excluded
from data.samples.record_files import class_count, shard_files, shard_hashes

# Open files per process. The usual limit is 1,024, and loaders need some for their batches.
_OPEN_FILES = 256


def image_and_label(example: bytes, num_classes: int) -> tuple[bytes, int]:
    """Return the encoded image of an example and its label, from 0.

    Raises:
        DataError: A feature is missing or the label (from 1 in the record) is out of range.
    """
    features = tfrecord.decode_example(example)
    try:
        (image,), (label,) = features[tfrecord.IMAGE], features[tfrecord.LABEL]
    except (KeyError, ValueError) as error:
        raise DataError(
            f"a record must hold one {tfrecord.IMAGE} and one {tfrecord.LABEL}"
        ) from error
    if not isinstance(image, bytes) or not isinstance(label, int):
        raise DataError(f"{tfrecord.IMAGE} must be bytes and {tfrecord.LABEL} an integer")
    if not 1 <= label <= num_classes:
        raise DataError(f"label {label} is not in 1 .. {num_classes}")
    return image, label - 1


class RecordSet:
    """The records of one split by number, in the order of the files. Each takes one read.

    The table of records, and which of them are verified, lie in shared memory: once per rank, for
    any number of workers. The checksums of a record are verified when it is read for the first
    time.

    Attributes:
        num_classes: Labels are 0 .. num_classes - 1.
        block: Number of consecutive records to read in one piece when the first of them is needed;
            see `data.loader.order.permutation`.
        unmatched: Names to exclude that are not among the records.
        contents: What distinguishes these records from others with the same names and sizes.
    """

    def __init__(
        self,
        files: list[tuple[str, str]],
        num_classes: int,
        block: int = 1,
        excluded: Collection[str] = (),
        contents: str = "",
    ) -> None:
        self.num_classes = num_classes
        self.block = block
        self.contents = contents
        self._paths = [path for path, _ in files]
        unmatched, rows = set(excluded), []
        for number, (path, index) in enumerate(files):
            table = self._rows(number, path, index)
            if excluded:
                names = [f"{os.path.basename(path)}#{record}" for record in range(len(table))]
                table = table[[name not in excluded for name in names]]
                unmatched.difference_update(names)
            rows.append(table)
        self.unmatched = sorted(unmatched)
        self._table = torch.from_numpy(np.concatenate(rows)).share_memory_()
        self._verified = torch.zeros(len(self._table), dtype=torch.bool).share_memory_()
        self._reset()

    @staticmethod
    def _rows(number: int, path: str, index: str) -> np.ndarray:
        """Return (file, record in the file, offset, size) of the file's records."""
        table = tfrecord.read_index(index, os.path.getsize(path))
        count = len(table)
        return np.column_stack([np.full(count, number), np.arange(count), table])

    def _reset(self) -> None:
        self._open: OrderedDict[int, int] = OrderedDict()
        self._piece = b""
        self._piece_file, self._piece_start = -1, 0

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without open files and without the piece in memory."""
        return {k: v for k, v in vars(self).items() if k != "_open" and "_piece" not in k}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the table; files are opened when they are needed."""
        vars(self).update(state)
        self._reset()

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._table)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the files' names (not their folder), the records' positions and `contents`."""
        names = [os.path.basename(path) for path in self._paths]
        sha = hashlib.sha256(
            repr((self.num_classes, names, self.contents)).encode(errors="surrogateescape")
        )
        sha.update(self._table.numpy())
        return sha.hexdigest()[:16]

    def name(self, index: int) -> str:
        """Return ``<file>#<number of the record in the file, from 0>``."""
        file, record, _, _ = self._table[index].tolist()
        return f"{os.path.basename(self._paths[file])}#{record}"

    def path(self, index: int) -> str:
        """Return `name` with the full path of the file."""
        file, record, _, _ = self._table[index].tolist()
        return f"{self._paths[file]}#{record}"

    def encoded(self, index: int) -> tuple[bytes, int]:
        """Return the image file of record `index`, and its label."""
        file, record, offset, size = self._table[index].tolist()
        try:
            record_bytes = self._bytes(index, file, offset, size)
            payload = tfrecord.payload(record_bytes, check_crc=not self._verified[index])
            self._verified[index] = True
            return image_and_label(payload, self.num_classes)
        except (DataError, OSError) as error:
            raise DataError(f"{self._paths[file]}#{record} at byte {offset}: {error}") from error

    def read(self, index: int, crop_fn: CropFn = full_image) -> tuple[Pixels, int]:
        """Return a box of image `index`, uint8 (height, width, 3), and its label."""
        encoded, label = self.encoded(index)
        try:
            return decode(encoded, crop_fn), label
        except DataError as error:
            raise DataError(f"{self.path(index)} {error}") from error

    def _bytes(self, index: int, file: int, offset: int, size: int) -> bytes:
        if self.block == 1:
            return os.pread(self._descriptor(file), size, offset)
        start = offset - self._piece_start
        if file != self._piece_file or start < 0 or start + size > len(self._piece):
            self._piece = os.pread(self._descriptor(file), self._piece_size(index, file), offset)
            self._piece_file, self._piece_start = file, offset
            start = 0
        return self._piece[start : start + size]

    def _piece_size(self, index: int, file: int) -> int:
        """Return the bytes from record `index` to the end of its block, within its file."""
        stop = (index // self.block + 1) * self.block
        rows = self._table[index:stop]
        rows = rows[rows[:, 0] == file]
        return int(rows[-1, 2] + rows[-1, 3] - rows[0, 2])

    def _descriptor(self, file: int) -> int:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        if len(self._open) == _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        self._open[file] = os.open(self._paths[file], os.O_RDONLY)
        return self._open[file]

    def __del__(self) -> None:
        """Close the files."""
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


def open_records(
    folder: str, split: str, flag: str, exclude: str | None = None, block: int = 1
) -> RecordSet:
    """Open the records of one split.

    Args:
        folder: Folder of record files, index files and perhaps a manifest.
        split: ``train`` or ``validation``.
        flag: The flag that named the folder; error messages begin with it.
        exclude: List of records to leave out.
        block: Number of consecutive records to read in one piece.

    Raises:
        DataError: The files cannot be used.
    """
    excluded = read_excluded(exclude, split)
    try:
        samples = RecordSet(
            shard_files(folder, split),
            class_count(folder),
            block,
            excluded,
            shard_hashes(folder, split),
        )
    except DataError as error:
        raise DataError(f"{flag}: {error}") from error
    except OSError as error:
        raise DataError(f"{flag}: {error.filename} cannot be read: {error.strerror}") from error
    if not len(samples):
        raise DataError(f"{flag}: {folder}/{split} holds no records")
    return samples
