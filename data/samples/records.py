"""TFRecords as single samples: any record by its number."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from data import DataError, SetError
from data.samples import tfrecord
from data.samples.encoded import LargeFiles
from data.samples.exclude import read_excluded, refuse_none_left
from data.samples.listing import first_few
from data.samples.open_files import OpenFiles, whole
from data.samples.record_files import Manifest, shard_files
from data.tooling.limits import share


@dataclass(frozen=True)
class Example:
    """The content of one record.

    Attributes:
        image: The encoded image file.
        label: The label as it is in the record.
        first_label: Label of the first class in records with these features, 0 or 1.
        class_name: Name of the class; None if the record does not hold it.
    """

    image: bytes
    label: int
    first_label: int
    class_name: str | None


def parse_example(payload: bytes) -> Example:
    """Return the content of a record.

    Raises:
        SetError: A feature is missing or has another type, which holds for all records of a set.
        DataError: The bytes are not an example.
    """
    features = tfrecord.decode_example(payload)
    names = tfrecord.IMAGE, tfrecord.LABEL
    if tfrecord.IMAGE not in features and tfrecord.TFDS_IMAGE in features:
        names = tfrecord.TFDS_IMAGE, tfrecord.TFDS_LABEL
    image, label = (features.get(name, []) for name in names)
    if len(image) != 1 or len(label) != 1:
        raise SetError(
            f"a record must hold one {names[0]} and one {names[1]}; this one holds "
            f"{first_few(sorted(features))}"
        )
    if not isinstance(image[0], bytes) or not isinstance(label[0], int):
        raise SetError(f"{names[0]} must be bytes and {names[1]} an integer")
    synset = next(iter(features.get(tfrecord.CLASS_NAME, [])), None)
    class_name = os.fsdecode(synset) if isinstance(synset, bytes) else None
    return Example(image[0], label[0], int(names[1] == tfrecord.LABEL), class_name)


def label_from_zero(example: Example, num_classes: int, label_base: int | None) -> int:
    """Return the label of an example as a number from 0.

    Args:
        example: The example.
        num_classes: Number of classes.
        label_base: Label of the first class; None: what records with these features usually have.

    Raises:
        SetError: The label is out of range, so the set counts differently or has other classes.
    """
    first = example.first_label if label_base is None else label_base
    label = example.label - first
    if 0 <= label < num_classes:
        return label
    last = first + num_classes - 1
    if label == -1:
        reason = "; this set counts from 0: give --label-base 0"
    elif label == num_classes and first == 0:
        reason = "; this set seems to count from 1: give --label-base 1"
    else:
        reason = (
            "; the set has more classes: write its manifest with python -m data.make_tfrecords "
            "--from-tfrecords"
        )
    raise SetError(f"label {example.label} is not in {first} .. {last}{reason}")


class RecordSet(LargeFiles):
    """The records of one split by number, in the order of the files. Each takes one read.

    The table of records, and which of them are verified, lie in shared memory: once per rank, for
    any number of workers. The checksums of a record are verified when it is read for the first
    time.

    A file comes with the path of its index file, or with its index: (offset, size) of each record.

    Attributes:
        num_classes: Labels are 0 .. num_classes - 1.
        block: Number of consecutive records to read in one piece when the first of them is needed;
            see `data.loader.order.permutation`.
        unmatched: Names to exclude that are not among the records.
        contents: What distinguishes these records from others with the same names and sizes.
        label_base: Label of the first class in the records; None: by the names of the features.
        class_names: Names of the classes in the order of the labels; empty if they are unknown.
    """

    _of_process: ClassVar = ("_files", "_piece", "_piece_file", "_piece_start")

    def __init__(
        self,
        files: Sequence[tuple[str, str | NDArray[np.int64]]],
        num_classes: int,
        block: int = 1,
        excluded: Collection[str] = (),
        contents: str = "",
        label_base: int | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        self.num_classes = num_classes
        self.label_base = label_base
        self.class_names = class_names
        self.block = block
        self.contents = contents
        self._paths = [path for path, _ in files]
        unmatched, rows = set(excluded), []
        for number, (path, index) in enumerate(files):
            table = self._rows_of(number, path, index)
            if excluded:
                names = [f"{os.path.basename(path)}#{record}" for record in range(len(table))]
                table = table[[name not in excluded for name in names]]
                unmatched.difference_update(names)
            rows.append(table)
        self.unmatched = sorted(unmatched)
        self._rows = share(torch.from_numpy(np.concatenate(rows)))
        self._verified = share(torch.zeros(len(self._rows), dtype=torch.bool))
        self._reset()

    @staticmethod
    def _rows_of(number: int, path: str, index: str | NDArray[np.int64]) -> np.ndarray:
        """Return (file, record in the file, offset, size) of the file's records."""
        table = (
            tfrecord.read_index(index, os.path.getsize(path)) if isinstance(index, str) else index
        )
        count = len(table)
        if not count:
            raise SetError(f"{path} is empty: it holds no records; copy or make it again")
        return np.column_stack([np.full(count, number), np.arange(count), table])

    def _reset(self) -> None:
        self._files = OpenFiles(self._paths)
        self._piece = b""
        self._piece_file, self._piece_start = -1, 0

    def _identity(self) -> tuple[str, list[NDArray[np.int64]]]:
        return self.contents, [self._rows.numpy()]

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the number of the file, and that of the record in it, from 0."""
        file, record, _, _ = self._rows[index].tolist()
        return file, record

    def encoded(self, index: int) -> tuple[bytes, int]:
        """Return the image file of record `index`, and its label."""
        example, label = self._example(index)
        return example.image, label

    def refuse_other_kinds(self) -> None:
        """Raise SetError if the first record shows that no record of the set can be used."""
        if len(self):
            try:
                self._example(0)
            except SetError:
                raise
            except DataError:  # one bad record, which is met again in training
                pass

    def _example(self, index: int) -> tuple[Example, int]:
        """Return the content of record `index`, and its label from 0."""
        file, record, offset, size = self._rows[index].tolist()
        try:
            record_bytes = self._bytes(index, file, offset, size)
            payload = tfrecord.payload(record_bytes, check_crc=not self._verified[index])
            self._verified[index] = True
            example = parse_example(payload)
            return example, label_from_zero(example, self.num_classes, self.label_base)
        except (DataError, OSError) as error:
            kind = type(error) if isinstance(error, DataError) else DataError
            raise kind(f"{self._paths[file]}#{record} at byte {offset}: {error}") from error

    def _bytes(self, index: int, file: int, offset: int, size: int) -> bytes:
        record = self._read_bytes(index, file, offset, size)
        return whole(record, size)

    def _read_bytes(self, index: int, file: int, offset: int, size: int) -> bytes:
        if self.block == 1:
            return self._files.read(file, offset, size)
        start = offset - self._piece_start
        if file != self._piece_file or start < 0 or start + size > len(self._piece):
            self._piece = self._files.read(file, offset, self._piece_size(index, file))
            self._piece_file, self._piece_start = file, offset
            start = 0
        return self._piece[start : start + size]

    def _piece_size(self, index: int, file: int) -> int:
        """Return the bytes from record `index` to the end of its block, within its file."""
        stop = (index // self.block + 1) * self.block
        rows = self._rows[index:stop]
        rows = rows[rows[:, 0] == file]
        return int(rows[-1, 2] + rows[-1, 3] - rows[0, 2])


def open_records(
    folder: str,
    split: str,
    flag: str,
    exclude: str | None = None,
    block: int = 1,
    label_base: int | None = None,
) -> RecordSet:
    """Open the records of one split.

    Args:
        folder: Folder of record files, index files and perhaps a manifest.
        split: ``train`` or ``validation``.
        flag: The flag that named the folder; error messages begin with it.
        exclude: List of records to leave out.
        block: Number of consecutive records to read in one piece.
        label_base: Label of the first class in the records; None: what the manifest says, or else
            what records with these features usually have.

    Raises:
        DataError: The files cannot be used.
    """
    excluded = read_excluded(exclude, split)
    try:
        files = shard_files(folder, split)
        manifest = Manifest(folder)
        base = manifest.label_base(label_base)
        samples = RecordSet(
            files,
            manifest.num_classes,
            block,
            excluded,
            contents=manifest.hashes(split) + (" labels from 0" if base == 0 else ""),
            label_base=base,
            class_names=manifest.class_names,
        )
        manifest.compare(split, files)
        samples.refuse_other_kinds()
    except DataError as error:
        raise type(error)(f"{flag}: {error}") from error
    except OSError as error:
        raise DataError(f"{flag}: {error.filename} cannot be read: {error.strerror}") from error
    refuse_none_left(len(samples), exclude, split)
    return samples
