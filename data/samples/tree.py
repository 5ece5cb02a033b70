"""A folder of class folders of images: scanned once, kept as a compact table."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch

from data import DataError
from data.samples.class_folders import Oddities, list_folder
from data.samples.encoded import EncodedImages
from data.samples.listing import first_few, pack, unpack
from data.tooling.limits import TOO_MANY_FILES, share, too_many_open_files

# Images whose bytes are compared to find out whether one folder is a copy of another.
_COMPARED = 5


class FileTree(EncodedImages):
    """The images ``root/<class>/**/<image>``, numbered class by class in sorted order.

    That is torchvision's order. The names are one tensor of bytes with offsets, in shared memory:
    1.28 million files take 40 MB once per rank, for any number of workers, instead of 200 MB in
    each worker.

    Args:
        root: The folder.
        classes: Names of the class folders, sorted.
        packed: Names of the images in each of them, as from `pack`.
        unmatched: Names to exclude that are not in the folder.
        oddities: What is unusual about the folder.

    Attributes:
        root: The folder.
        classes: Names of the class folders, sorted; a label is a position in this list.
        num_classes: Number of classes.
        counts: Number of images in each class.
        unmatched: Names to exclude that are not in the folder.
        oddities: What is unusual about the folder.
    """

    def __init__(
        self,
        root: str,
        classes: Sequence[str],
        packed: Sequence[bytes],
        unmatched: Sequence[str] = (),
        oddities: Oddities | None = None,
    ) -> None:
        self.root = root
        self.unmatched = unmatched
        self.oddities = oddities or Oddities()
        self.classes = list(classes)
        self.num_classes = len(classes)
        self.counts = [names.count(0) for names in packed]
        content = np.frombuffer(b"".join(packed), dtype=np.uint8)
        is_end = content == 0
        ends = np.flatnonzero(is_end)
        names = content[~is_end] if len(ends) else np.zeros(1, np.uint8)
        self._names = torch.from_numpy(names)
        self._ends = torch.from_numpy(ends - np.arange(len(ends)))
        self._class_ends = torch.tensor(self.counts, dtype=torch.int64).cumsum(0)
        for tensor in (self._names, self._ends, self._class_ends):
            share(tensor)

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

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of the labels."""
        return self.classes

    def label(self, index: int) -> int:
        """Return the class of image `index`."""
        return int(np.searchsorted(self._class_ends.numpy(), index, side="right"))

    def file(self, index: int) -> str:
        """Return the name of image `index` within its class."""
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._names[start : int(self._ends[index])].numpy().tobytes())

    def name(self, index: int) -> str:
        """Return the name of image `index`: ``<class>/<file>``."""
        return f"{self.classes[self.label(index)]}/{self.file(index)}"

    def path(self, index: int) -> str:
        """Return the path of image `index`."""
        return os.path.join(self.root, self.classes[self.label(index)], self.file(index))

    def encoded(self, index: int) -> tuple[bytes, int]:
        """Return the bytes of image `index`, and its label."""
        return read_image(self.path(index)), self.label(index)


def same_images(train: FileTree, val: FileTree) -> bool:
    """Whether two trees are the same folder, or one lies in the other, or is a copy of it."""
    roots = {os.path.realpath(tree.root) for tree in (train, val)}
    return os.path.commonpath(roots) in roots or are_copies(train, val)


def are_copies(train: FileTree, val: FileTree) -> bool:
    """Whether two trees have the same names, and the same bytes in the first images."""
    if train.fingerprint != val.fingerprint:
        return False
    first = range(min(len(train), _COMPARED))
    try:
        return all(train.encoded(index) == val.encoded(index) for index in first)
    except DataError:
        return False


def warnings_about(
    train: FileTree,
    val: FileTree,
    hold: str,
    are_same: Callable[[FileTree, FileTree], bool] = same_images,
) -> list[str]:
    """Return whether validation uses the training images, and what was left out.

    Args:
        train: Training images.
        val: Validation images.
        hold: Beginning of the warning: ``A and B hold``.
        are_same: Tells whether both are the same images.
    """
    notes = [*train.oddities.notes, *val.oddities.notes]
    if not are_same(train, val):
        return notes
    return [f"{hold} the same images, so validation says nothing about new images", *notes]


def read_image(path: str) -> bytes:
    """Return the bytes of an image file.

    Raises:
        SetError: Too many files are open.
        DataError: The file cannot be read; the message names it.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            raise too_many_open_files() from error
        raise DataError(f"{path} {why_unreadable(path, error)}") from error


def why_unreadable(path: str, error: OSError) -> str:
    """Return why a file cannot be read; a dangling link is reported as a link."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"is a link to {os.readlink(path)}, which does not exist"
    return f"cannot be read: {error.strerror}"


def scan(root: str, flag: str, excluded: Collection[str] = ()) -> FileTree:
    """List the images under `root`.

    Args:
        root: A folder of class folders.
        flag: The flag that named it, for error messages.
        excluded: Names to leave out, in the form of `FileTree.name`.

    Raises:
        DataError: `root` is not a folder, it holds no class folders, a class folder holds no image,
            a link has no target, or an entry cannot be listed (a link that points to itself, for
            example).
    """
    tree = scan_with_gaps(root, flag, excluded)
    broken = tree.oddities.broken_links
    if broken:
        raise DataError(
            f"{flag}: {root}: {first_few(broken)} "
            f"{why_unreadable(os.path.join(root, broken[0]), FileNotFoundError())}; restore the "
            "target, or remove the link"
        )
    empty = [name for name, count in zip(tree.classes, tree.counts, strict=True) if not count]
    if empty:
        raise DataError(
            f"{flag}: {root}: no image in class folder {first_few(empty)}; fill or remove it"
        )
    return tree


def scan_with_gaps(root: str, flag: str, excluded: Collection[str] = ()) -> FileTree:
    """List the images as `scan` does, but accept empty class folders and links without a target."""
    if not os.path.isdir(root):
        raise DataError(f"{flag}: {root} is not a folder")
    try:
        listing = list_folder(root)
    except OSError as error:
        raise DataError(f"{flag}: {error.filename} cannot be listed: {error.strerror}") from error
    if not listing.classes:
        raise DataError(
            f"{flag}: {root} holds {listing.loose} images but no class folders; "
            "sort the images into one folder per class"
            + (" (python -m data.prepare does it for ImageNet)" if listing.loose else "")
        )
    unmatched = set(excluded)
    packed = [
        without(name, folder.packed, excluded, unmatched)
        for name, folder in zip(listing.classes, listing.folders, strict=True)
    ]
    return FileTree(root, listing.classes, packed, sorted(unmatched), listing.oddities())


def without(
    class_name: str, packed: bytes, excluded: Collection[str], unmatched: set[str]
) -> bytes:
    """Return the packed names of a class without the excluded ones, and remove these from `unmatched`."""
    if not excluded:
        return packed
    names = {name: f"{class_name}/{name}" for name in unpack(packed)}
    unmatched.difference_update(names.values())
    return pack(name for name, line in names.items() if line not in excluded)
