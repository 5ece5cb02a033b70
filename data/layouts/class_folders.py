"""Folders ``train`` and ``val`` of images in one folder per class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.layouts import FLAG, Found, Options

if TYPE_CHECKING:
    from data.samples.tree import FileTree

HOLDS = "train/<class>/<image> and val/<class>/<image>"

TRAIN_NAMES = ("train", "training", "ILSVRC2012_img_train")
VAL_NAMES = ("val", "valid", "validation", "ILSVRC2012_img_val")


@dataclass(frozen=True)
class Split:
    """Where the images of one split are."""

    folder: str


def recognise(path: str) -> Found | None:
    """Look for folders of class folders."""
    train, val = _split(path, TRAIN_NAMES), _split(path, VAL_NAMES)
    if train is None and val is None:
        return None
    folders = [os.path.basename(split.folder) for split in (train, val) if split is not None]
    title = f"class folders in {' and '.join(folders)}"
    return Found("class_folders", path, title, "position of the class in sorted order", train, val)


def open_split(found: Found, split: str, options: Options) -> FileTree:
    """List the images of one split."""
    from data import DataError
    from data.samples.exclude import read_excluded
    from data.samples.tree import scan

    where: Split = getattr(found, split)
    tree = scan(where.folder, FLAG, read_excluded(options.exclude, split))
    if tree.oddities.implausible:
        raise DataError(f"{FLAG}: {tree.oddities.implausible}")
    return tree


def warnings(found: Found, train: FileTree, val: FileTree) -> Sequence[str]:
    """Return what was left out, and whether validation uses the training images."""
    from data.samples.tree import same_images

    notes = [*train.oddities.notes, *val.oddities.notes]
    if same_images(train, val):
        notes.insert(
            0,
            f"{train.root} and {val.root} hold the same images, so validation says nothing about "
            "new images",
        )
    return notes


def _split(path: str, names: Sequence[str]) -> Split | None:
    for name in names:
        folder = os.path.join(path, name)
        if _has_folders(folder):
            return Split(folder)
    return None


def _has_folders(folder: str) -> bool:
    """Whether a folder holds visible folders; it stops at the first one."""
    from data.samples.listing import is_ignored

    try:
        with os.scandir(folder) as entries:
            return any(entry.is_dir() and not is_ignored(entry.name) for entry in entries)
    except OSError:
        return False
