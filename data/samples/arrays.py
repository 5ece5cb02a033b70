"""Samples that fit into memory: stored once per rank and shared by its workers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from data import DataError, SetError
from data.pixels.boxes import CropFn, Pixels, crop, full_image
from data.pixels.decode import decode
from data.tooling.limits import share


class ArraySamples:
    """Images of one size in one array.

    Args:
        images: uint8 (samples, height, width, 3).
        labels: Integers (samples,).
        num_classes: Labels are 0 .. num_classes - 1.
        class_names: Names of the classes in the order of the labels; empty if they are unknown.

    Raises:
        DataError: The shapes do not match, or a label is out of range.
    """

    def __init__(
        self,
        images: Pixels,
        labels: NDArray[np.int64],
        num_classes: int,
        class_names: Sequence[str] = (),
    ) -> None:
        if images.ndim != 4 or images.shape[3] != 3 or len(images) != len(labels):
            raise DataError(f"{images.shape} images and {labels.shape} labels do not match")
        _check_labels(labels, num_classes)
        self.num_classes = num_classes
        self.class_names = class_names
        self._images = share(torch.from_numpy(np.ascontiguousarray(images)))
        self._labels = share(torch.from_numpy(labels.astype(np.int64)))

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._labels)

    @property
    def fingerprint(self) -> str:
        """Hash of the labels in order; the images have no names."""
        return hashlib.sha256(self._labels.numpy().data).hexdigest()[:16]

    def read(self, index: int, crop_fn: CropFn = full_image) -> tuple[Pixels, int]:
        """Return a box of image `index`, uint8 (height, width, 3), and its label."""
        pixels = self._images[index].numpy()
        return crop(pixels, crop_fn(*pixels.shape[:2])), int(self._labels[index])


class EncodedFiles:
    """Small encoded image files, concatenated in one array.

    Args:
        files: (name, bytes) of each image.
        labels: Class of each image.
        num_classes: Labels are 0 .. num_classes - 1.
        class_names: Names of the classes in the order of the labels; empty if they are unknown.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, bytes]],
        labels: NDArray[np.int64],
        num_classes: int,
        class_names: Sequence[str] = (),
    ) -> None:
        _check_labels(labels, num_classes)
        self.num_classes = num_classes
        self.class_names = class_names
        self._names = [name for name, _ in files]
        content = bytearray(b"".join(data for _, data in files) or b"\0")
        self._bytes = share(torch.frombuffer(content, dtype=torch.uint8))
        sizes = torch.tensor([len(data) for _, data in files], dtype=torch.int64)
        self._ends = share(sizes.cumsum(0))
        self._labels = share(torch.from_numpy(labels.astype(np.int64)))

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._labels)

    @property
    def fingerprint(self) -> str:
        """Hash of the files' sizes and labels in order; names may be paths, so they do not count."""
        sha = hashlib.sha256(self._ends.numpy().data)
        sha.update(self._labels.numpy().data)
        return sha.hexdigest()[:16]

    def read(self, index: int, crop_fn: CropFn = full_image) -> tuple[Pixels, int]:
        """Return a box of image `index`, uint8 (height, width, 3), and its label."""
        start = int(self._ends[index - 1]) if index else 0
        encoded = self._bytes[start : int(self._ends[index])].numpy().tobytes()
        try:
            return decode(encoded, crop_fn), int(self._labels[index])
        except DataError as error:  # these sets are published as a whole, so all of it is suspect
            raise SetError(
                f"{self._names[index]} {error}; the data set is damaged: download it again"
            ) from error


def _check_labels(labels: NDArray[np.int64], num_classes: int) -> None:
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise DataError(f"a label is not in 0 .. {num_classes - 1}")
