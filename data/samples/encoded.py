"""What samples have in common whose images are encoded: in files of their own, or in large files."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data import DataError
from data.pixels.boxes import CropFn, Pixels, full_image
from data.pixels.decode import decode


class EncodedImages:
    """Samples that decode what `encoded` returns."""

    def encoded(self, index: int) -> tuple[bytes, int]:
        """Return the image file of image `index`, and its label."""
        raise NotImplementedError

    def path(self, index: int) -> str:
        """Return where image `index` is, for error messages."""
        raise NotImplementedError

    def read(self, index: int, crop_fn: CropFn = full_image) -> tuple[Pixels, int]:
        """Return a box of image `index`, uint8 (height, width, 3), and its label."""
        encoded, label = self.encoded(index)
        try:
            return decode(encoded, crop_fn), label
        except DataError as error:
            raise DataError(f"{self.path(index)} {error}") from error


class LargeFiles(EncodedImages):
    """Images in large files, by number.

    A subclass sets the attributes below. It defines `encoded`, `_locate`, `_identity` and
    `_reset`, which makes the attributes that are named in `_of_process`.

    Attributes:
        num_classes: Labels are 0 .. num_classes - 1.
    """

    # Attributes that are not copied: each process and each thread has its own.
    _of_process: ClassVar[tuple[str, ...]]

    num_classes: int
    _paths: list[str]
    _rows: Tensor  # one row for each image

    def _reset(self) -> None:
        """Set the attributes of this process as they are before anything is read."""
        raise NotImplementedError

    def _locate(self, index: int) -> tuple[int, int | str]:
        """Return the number of an image's file, and the image's number or name in it."""
        raise NotImplementedError

    def _identity(self) -> tuple[Any, Sequence[NDArray[np.int64]]]:
        """Return what tells these images from others: a value with a `repr`, and tables."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without open files and without images in memory."""
        return {k: v for k, v in vars(self).items() if k not in self._of_process}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the tables; files are opened when they are needed."""
        vars(self).update(state)
        self._reset()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._rows)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the files' names (not their folder), and of the images' positions and labels."""
        value, tables = self._identity()
        names = [os.path.basename(path) for path in self._paths]
        identity = repr((self.num_classes, names, value))
        sha = hashlib.sha256(identity.encode(errors="surrogateescape"))
        for table in tables:
            sha.update(np.ascontiguousarray(table).data)
        return sha.hexdigest()[:16]

    def name(self, index: int) -> str:
        """Return ``<file>#<number or name of the image in the file>``."""
        file, place = self._locate(index)
        return f"{os.path.basename(self._paths[file])}#{place}"

    def path(self, index: int) -> str:
        """Return `name` with the full path of the file."""
        file, place = self._locate(index)
        return f"{self._paths[file]}#{place}"
