"""Parquet files of images as Hugging Face publishes them: any image by its number.

The columns are ``image``, a struct of ``bytes`` (the image file) and ``path``, or plain bytes, and
``label``, an integer from 0. The rows of a file are stored in row groups, 100 images each in
Hugging Face's files. A row group is compressed in one piece, so it is read and unpacked in one
piece. A reader keeps the last row group in memory, and training shuffles row groups instead of
single images (`ParquetSet.block`). Each row group is then read once per epoch, or twice if two
micro-batches divide it.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from data import DataError, SetError
from data.samples.encoded import LargeFiles
from data.samples.exclude import read_excluded, refuse_none_left
from data.samples.labels import refuse_labels
from data.samples.parquet_files import AGAIN, import_parquet, look_at
from data.samples.shard_names import refuse_incomplete
from data.tooling.limits import TOO_MANY_FILES, share, too_many_open_files

# Open files per process. Each also keeps its footer in memory, some 100 kB.
_OPEN_FILES = 16

# Reading the footers and labels from a network file system is mostly waiting.
_THREADS = 8


class ParquetSet(LargeFiles):
    """The images of one split by number, in the order of the files and their rows.

    The tables lie in shared memory: once per rank, for any number of workers. A process holds one
    row group in memory.

    Args:
        paths: The files.
        excluded: Names to leave out, in the form of `name`.
        num_classes: Number of classes; None: what the files say.
        label_base: Label of the first class in the files.

    Attributes:
        num_classes: Labels are 0 .. num_classes - 1.
        class_names: Names of the classes in the order of the labels; empty if they are unknown.
        unmatched: Names to exclude that are not among the images.
        group_bytes: Bytes of the largest row group, unpacked.

    Raises:
        DataError: The files cannot be used.
    """

    _of_process: ClassVar = ("_open", "_images")

    def __init__(
        self,
        paths: Sequence[str],
        excluded: Collection[str] = (),
        num_classes: int | None = None,
        label_base: int = 0,
    ) -> None:
        refuse_incomplete(paths)
        import_parquet()  # once, before the threads do it
        with ThreadPoolExecutor(_THREADS) as threads:
            files = list(threads.map(look_at, paths))
        for path, file in zip(paths, files, strict=True):
            if not len(file.labels):
                raise SetError(f"{path} is empty: it holds no images; {AGAIN}")
            if file.class_names != files[0].class_names:
                raise SetError(f"{path} has other class names than {paths[0]}; {AGAIN}")
        self._paths = list(paths)
        self._columns = [file.column for file in files]
        self._sizes = [file.size for file in files]
        self._rows_of_files = [len(file.labels) for file in files]
        self.class_names = files[0].class_names
        self.group_bytes = max(size for file in files for size in file.group_bytes)
        labels = np.concatenate([file.labels for file in files]) - label_base
        self.num_classes = num_classes or len(self.class_names) or int(labels.max()) + 1
        certain = num_classes is not None or bool(self.class_names)
        refuse_labels(labels, self.num_classes, label_base, certain)
        # (file, row group in the file, first row in the split) of each row group
        groups = [(i, g) for i, file in enumerate(files) for g in range(len(file.rows))]
        rows = np.array([n for file in files for n in file.rows], dtype=np.int64)
        self._groups = np.column_stack([np.array(groups), np.cumsum(rows) - rows])
        kept = self._without(excluded)
        self._rows = share(torch.from_numpy(kept))
        self._labels = share(torch.from_numpy(labels[kept]))
        self._reset()

    def _without(self, excluded: Collection[str]) -> NDArray[np.int64]:
        """Return the rows that are not excluded, and set `unmatched`."""
        kept = np.ones(sum(self._rows_of_files), dtype=bool)
        start = dict(zip(map(os.path.basename, self._paths), self._file_starts(), strict=True))
        counts = dict(zip(start, self._rows_of_files, strict=True))
        unmatched = []
        for name in excluded:
            file, _, row = name.rpartition("#")
            if row.isdecimal() and int(row) < counts.get(file, 0):
                kept[start[file] + int(row)] = False
            else:
                unmatched.append(name)
        self.unmatched = sorted(unmatched)
        return np.flatnonzero(kept)

    def _file_starts(self) -> list[int]:
        """Return the number of the first row of each file."""
        return (np.cumsum(self._rows_of_files) - self._rows_of_files).tolist()

    def _reset(self) -> None:
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._group_in_memory, self._images = -1, None

    def _identity(self) -> tuple[list[int], list[NDArray[np.int64]]]:
        return self._sizes, [self._groups, self._rows.numpy(), self._labels.numpy()]

    @property
    def block(self) -> NDArray[np.int64]:
        """Number of the first image of each row group: what training shuffles."""
        starts = np.searchsorted(self._rows.numpy(), self._groups[:, 2])
        return np.unique(starts[starts < len(self)])

    @property
    def sorted_by_class(self) -> bool:
        """Whether most images have the class of the one before, so that row groups lack variety."""
        labels = self._labels.numpy()
        return self.num_classes > 2 and bool((labels[1:] == labels[:-1]).mean() > 0.5)

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the number of the file, and the row in it, from 0."""
        row, starts = int(self._rows[index]), self._file_starts()
        file = int(np.searchsorted(starts, row, side="right")) - 1
        return file, row - starts[file]

    def encoded(self, index: int) -> tuple[bytes, int]:
        """Return the image file of image `index`, and its label."""
        row = int(self._rows[index])
        group = int(np.searchsorted(self._groups[:, 2], row, side="right")) - 1
        if group != self._group_in_memory:
            self._images, self._group_in_memory = None, -1  # free it before the next one is read
            self._images, self._group_in_memory = self._read_group(group), group
        assert self._images is not None
        image = self._images[row - int(self._groups[group, 2])].as_py()
        if image is None:
            raise DataError(f"{self.path(index)} holds no image, only a path or nothing")
        return image, int(self._labels[index])

    def _read_group(self, group: int) -> Any:
        """Return the encoded images of a row group, an array of pyarrow.

        Raises:
            SetError: Damage of a row group concerns all its images.
        """
        file, number, _ = self._groups[group].tolist()
        column = self._columns[file]
        try:
            table = self._file(file).read_row_group(number, columns=[column], use_threads=False)
            (images,) = table.columns
            if column == "image.bytes":
                import pyarrow.compute

                images = pyarrow.compute.struct_field(images, "bytes")
            return images
        except OSError as error:
            if error.errno in TOO_MANY_FILES:
                raise too_many_open_files() from error
            raise self._damaged(file, number, error) from error
        except Exception as error:  # damage can raise anything
            raise self._damaged(file, number, error) from error

    def _damaged(self, file: int, number: int, error: Exception) -> SetError:
        return SetError(
            f"{self._paths[file]}: row group {number} cannot be read ({error}); {AGAIN}"
        )

    def _file(self, file: int) -> Any:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        if len(self._open) >= _OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        if os.path.getsize(self._paths[file]) != self._sizes[file]:
            raise ValueError("the file has changed since this job began")
        self._open[file] = import_parquet().ParquetFile(self._paths[file], pre_buffer=False)
        return self._open[file]


def open_parquet(
    paths: Sequence[str],
    split: str,
    exclude: str | None = None,
    num_classes: int | None = None,
    label_base: int | None = None,
) -> ParquetSet:
    """Open the images of one split.

    Args:
        paths: The files.
        split: ``train`` or ``val``.
        exclude: List of images to leave out.
        num_classes: Number of classes; None: what the files say.
        label_base: Label of the first class in the files; None: 0.

    Raises:
        DataError: The files cannot be used.
    """
    samples = ParquetSet(paths, read_excluded(exclude, split), num_classes, label_base or 0)
    refuse_none_left(len(samples), exclude, split)
    return samples
