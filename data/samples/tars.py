"""WebDataset's tar files: any image by its number, from an index that is made once.

A sample is the members of one tar with the same name up to the first dot of its last part:
``n01440764_10026.jpg`` with ``n01440764_10026.cls``, or with ``n01440764_10026.json``, which holds
an entry ``label``. Labels are integers from 0. The images are numbered in the order of the tars and
of their members. Reading one takes one read and opens no file.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from data import DataError, SetError
from data.samples.encoded import LargeFiles
from data.samples.exclude import read_excluded, refuse_none_left
from data.samples.index_store import Tables, index_of
from data.samples.labels import refuse_labels
from data.samples.open_files import OpenFiles, whole
from data.samples.shard_names import refuse_incomplete
from data.samples.tar_index import index_tar, join_tables
from data.samples.tar_members import refuse_other_member
from data.tooling.limits import share

# Lists of class names, one in each line. TensorFlow Datasets writes the first one.
CLASS_NAMES = ("label.labels.txt", "classnames.txt", "classes.txt")


class TarSet(LargeFiles):
    """The images of one split by number, in the order of the tars and of their members.

    The tables lie in shared memory: once per rank, for any number of workers.

    Args:
        paths: The tars.
        index: Their index, from `join_tables`.
        excluded: Names to leave out, in the form of `name`.
        class_names: Names of the classes; empty: the WordNet IDs in the names of the images, if
            each class has one.
        num_classes: Number of classes; None: as many as `class_names`, or as the labels show.
        label_base: Label of the first class in the tars.

    Attributes:
        num_classes: Labels are 0 .. num_classes - 1.
        class_names: Names of the classes in the order of the labels; empty if they are unknown.
        unmatched: Names to exclude that are not among the images.

    Raises:
        SetError: A label is out of range.
    """

    _of_process: ClassVar = ("_files",)

    def __init__(
        self,
        paths: Sequence[str],
        index: Tables,
        excluded: Collection[str] = (),
        class_names: Sequence[str] = (),
        num_classes: int | None = None,
        label_base: int = 0,
    ) -> None:
        self._paths = list(paths)
        self._sizes = [os.path.getsize(path) for path in paths]
        labels = cast("NDArray[np.int64]", index["label"]) - label_base
        rows = np.column_stack([index["tar"], index["offset"], index["size"], labels])
        self._names = share(torch.from_numpy(index["names"].copy()))
        ends = cast("NDArray[np.int64]", index["ends"])
        self._rows = torch.from_numpy(
            np.column_stack([rows, np.concatenate([[0], ends[:-1]]), ends]).astype(np.int64)
        )
        self.num_classes = num_classes or len(class_names) or int(labels.max()) + 1
        certain = num_classes is not None or bool(class_names)
        refuse_labels(labels, self.num_classes, label_base, certain)
        in_names = [str(name) for name in index["classes"]]
        self.class_names = list(class_names) or in_names * (len(in_names) == self.num_classes)
        self.unmatched: list[str] = []
        if excluded:
            names = [self.name(number) for number in range(len(self))]
            self.unmatched = sorted(set(excluded).difference(names))
            self._rows = self._rows[[name not in excluded for name in names]]
        share(self._rows)
        self._reset()

    def _reset(self) -> None:
        self._files = OpenFiles(self._paths)

    def _identity(self) -> tuple[list[int], list[NDArray[np.int64]]]:
        return self._sizes, [self._rows.numpy()]

    def _member(self, index: int) -> str:
        start, end = self._rows[index, 4:].tolist()
        return os.fsdecode(self._names[start:end].numpy().tobytes())

    def _locate(self, index: int) -> tuple[int, str]:
        """Return the number of the tar, and the name of the image in it."""
        return int(self._rows[index, 0]), self._member(index)

    def encoded(self, index: int) -> tuple[bytes, int]:
        """Return the image file of image `index`, and its label."""
        file, offset, size, label = self._rows[index, :4].tolist()
        try:
            piece = self._files.read(file, offset - tarfile.BLOCKSIZE, size + tarfile.BLOCKSIZE)
            image = whole(piece, size + tarfile.BLOCKSIZE)[tarfile.BLOCKSIZE :]
            refuse_other_member(piece, os.fsencode(self._member(index)), size)
            return image, label
        except SetError as error:
            raise SetError(f"{self.path(index)} at byte {offset}: {error}") from error
        except OSError as error:
            raise DataError(f"{self.path(index)} cannot be read: {error.strerror}") from error


def make_index(
    folder: str,
    paths: Sequence[str],
    split: str,
    index_dir: str | None = None,
    index_all: Callable[..., Iterable[Any]] = map,
) -> Tables:
    """Return the index of one split; make it if that was not done before.

    Args:
        folder: Folder of the set.
        paths: The tars.
        split: ``train`` or ``val``.
        index_dir: Folder for the index; None: beside the tars, or the cache.
        index_all: Applies a function to all tars, like `map`, in their order.

    Raises:
        SetError: A tar is missing or damaged, or the index cannot be written.
    """
    refuse_incomplete(paths)
    return index_of(
        paths,
        folder,
        f"{split}-tars",
        lambda: join_tables(index_all(index_tar, paths)),
        index_dir,
    )


def read_class_names(folder: str) -> list[str]:
    """Return the lines of the list of class names in a folder; [] without one."""
    for name in CLASS_NAMES:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                return [line.strip() for line in file if line.strip()]
    return []


def open_tars(
    folder: str,
    paths: Sequence[str],
    split: str,
    exclude: str | None = None,
    num_classes: int | None = None,
    label_base: int | None = None,
    index_dir: str | None = None,
) -> TarSet:
    """Open the images of one split, and index them first if that was not done before.

    Args:
        folder: Folder of the set.
        paths: The tars.
        split: ``train`` or ``val``.
        exclude: List of images to leave out.
        num_classes: Number of classes; None: what the set says.
        label_base: Label of the first class in the tars; None: 0.
        index_dir: Folder for the index; None: beside the tars, or the cache.

    Raises:
        DataError: The tars cannot be used.
    """
    index = make_index(folder, paths, split, index_dir)
    samples = TarSet(
        paths,
        index,
        read_excluded(exclude, split),
        read_class_names(folder),
        num_classes,
        label_base or 0,
    )
    refuse_none_left(len(samples), exclude, split)
    return samples
