"""A folder of class folders of images: scanned once, kept as a compact table."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from data import DataError
from data.pixels.boxes import CropFn, Pixels, full_image
from data.pixels.decode import decode

# torchvision's list.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Listing a folder on a network file system is mostly waiting for replies, which threads overlap.
_SCAN_THREADS = 16


class FileTree:
    """The images ``root/<class>/**/<image>``, numbered class by class in sorted order.

    That is torchvision's order. The names are one tensor of bytes with offsets, in shared memory:
    1.28 million files take 40 MB once per rank, for any number of workers, instead of 200 MB in
    each worker.

    Attributes:
        root: The folder.
        classes: Names of the class folders, sorted; a label is a position in this list.
        num_classes: Number of classes.
        counts: Number of images in each class.
        unmatched: Names to exclude that are not in the folder.
    """

    def __init__(
        self,
        root: str,
        classes: Sequence[str],
        files: Sequence[Sequence[str]],
        unmatched: Sequence[str] = (),
    ) -> None:
        self.root = root
        self.unmatched = unmatched
        self.classes = list(classes)
        self.num_classes = len(classes)
        self.counts = [len(names) for names in files]
        encoded = [os.fsencode(name) for names in files for name in names]
        self._names = torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8)
        self._ends = torch.tensor([len(name) for name in encoded], dtype=torch.int64).cumsum(0)
        self._class_ends = torch.tensor(self.counts, dtype=torch.int64).cumsum(0)
        for tensor in (self._names, self._ends, self._class_ends):
            tensor.share_memory_()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._ends)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the names of classes and images in order; the root does not count."""
        sha = hashlib.sha256(os.fsencode("/".join(self.classes)))
        for table in (self._names, self._ends, self._class_ends):
            sha.update(table.numpy().data)
        return sha.hexdigest()[:16]

    def label(self, index: int) -> int:
        """Return the class of image `index`."""
        return int(np.searchsorted(self._class_ends.numpy(), index, side="right"))

    def name(self, index: int) -> str:
        """Return the name of image `index` within the root: ``<class>/<file>``."""
        start = int(self._ends[index - 1]) if index else 0
        name = os.fsdecode(self._names[start : int(self._ends[index])].numpy().tobytes())
        return f"{self.classes[self.label(index)]}/{name}"

    def path(self, index: int) -> str:
        """Return the path of image `index`."""
        return os.path.join(self.root, self.name(index))

    def encoded(self, index: int) -> tuple[bytes, int]:
        """Return the bytes of image `index`, and its label."""
        return read_image(self.path(index)), self.label(index)

    def read(self, index: int, crop_fn: CropFn = full_image) -> tuple[Pixels, int]:
        """Return a box of image `index`, uint8 (height, width, 3), and its label."""
        encoded, label = self.encoded(index)
        try:
            return decode(encoded, crop_fn), label
        except DataError as error:
            raise DataError(f"{self.path(index)} {error}") from error


def read_image(path: str) -> bytes:
    """Return the bytes of an image file.

    Raises:
        DataError: The file cannot be read; the message names it.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{path} {why_unreadable(path, error)}") from error


def why_unreadable(path: str, error: OSError) -> str:
    """Return why a file cannot be read; a dangling link is reported as a link."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"is a link to {os.readlink(path)}, which does not exist"
    return f"cannot be read: {error.strerror}"


def first_few(names: Sequence[str]) -> str:
    """Return the first few of many names, for a message."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more or "none"


def scan(root: str, flag: str, excluded: Collection[str] = ()) -> FileTree:
    """List the images under `root`.

    Args:
        root: A folder of class folders.
        flag: The flag that named it, for error messages.
        excluded: Names to leave out, in the form of `FileTree.name`.

    Raises:
        DataError: `root` is not a folder, it holds no class folders, a class folder holds no image,
            or an entry cannot be listed (a link that points to itself, for example).
    """
    tree = scan_with_empty_classes(root, flag, excluded)
    empty = [name for name, count in zip(tree.classes, tree.counts, strict=True) if not count]
    if empty:
        raise DataError(
            f"{flag}: {root}: no image in class folder {first_few(empty)}; "
            f"fill or remove it (images end in {' '.join(EXTENSIONS)})"
        )
    return tree


def scan_with_empty_classes(root: str, flag: str, excluded: Collection[str] = ()) -> FileTree:
    """List the images as `scan` does, but accept empty class folders."""
    if not os.path.isdir(root):
        raise DataError(f"{flag}: {root} is not a folder")
    try:
        return _scan(root, flag, excluded)
    except OSError as error:
        raise DataError(f"{flag}: {error.filename} cannot be listed: {error.strerror}") from error


def _scan(root: str, flag: str, excluded: Collection[str]) -> FileTree:
    with os.scandir(root) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        loose = sum(name.lower().endswith(EXTENSIONS) for name in os.listdir(root))
        raise DataError(
            f"{flag}: {root} holds {loose} images but no class folders; "
            "sort the images into one folder per class"
            + (" (python -m data.prepare does it for ImageNet)" if loose else "")
        )
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        files = list(pool.map(_images, [os.path.join(root, name) for name in classes]))
    unmatched = set(excluded)
    if excluded:
        for name, names in zip(classes, files, strict=True):
            unmatched.difference_update(f"{name}/{file}" for file in names)
        files = [
            [file for file in names if f"{name}/{file}" not in excluded]
            for name, names in zip(classes, files, strict=True)
        ]
    return FileTree(root, classes, files, sorted(unmatched))


def _images(folder: str) -> list[str]:
    """List the images under `folder`, relative to it, in torchvision's order: folder by folder."""
    found: list[tuple[str, str]] = []
    pending = [""]
    while pending:
        inner = pending.pop()
        with os.scandir(os.path.join(folder, inner)) as entries:
            for entry in entries:
                if entry.name.lower().endswith(EXTENSIONS) and not entry.is_dir():
                    found.append((inner, entry.name))
                elif entry.is_dir():
                    pending.append(os.path.join(inner, entry.name))
    return [os.path.join(inner, name) for inner, name in sorted(found)]
