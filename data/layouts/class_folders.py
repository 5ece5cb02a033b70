"""Training images in class folders, and validation images with or without class folders.

This covers prepared folders, Kaggle's download, the root of torchvision's ImageNet, Tiny-ImageNet,
and the unpacked tars of Hugging Face, whose file names end with the class.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data import DataError
from data.layouts import FLAG, Found, Options, labels, naming
from data.layouts.labels import LabelFile
from data.samples.listing import EXTENSIONS, first_few, is_ignored

if TYPE_CHECKING:
    from data.samples.tree import FileTree

HOLDS = (
    "train/<class>/<image> and val/<class>/<image>; or val/<image> with a file of labels "
    "(Kaggle's ILSVRC, torchvision's ImageNet); or names that end in _<wnid>.JPEG (Hugging Face)"
)

TRAIN_NAMES = ("train", "training", "ILSVRC2012_img_train", "train_images")
VAL_NAMES = ("val", "valid", "validation", "ILSVRC2012_img_val", "val_images")

# Where the two folders are in Kaggle's download, relative to the path.
_KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")

_TITLES = {"classes": "class folders", "suffix": "names that end in _<wnid>"}

_SUFFIX = re.compile(r"_(n\d{8})\.\w+$")

# Entries of a folder that are looked at to find out what it holds.
_LOOKED_AT = 1000


@dataclass(frozen=True)
class Split:
    """Where the images of one split are.

    Attributes:
        folder: The folder of the class folders or of the images.
        kind: ``classes``, ``suffix`` (the class is in the name) or ``labelled``.
        labels: The file that gives the classes.
        train: The folder of the training images, which gives the names of classes in numbers.
    """

    folder: str
    kind: str
    labels: LabelFile | None = None
    train: str | None = None


def recognise(path: str) -> Found | None:
    """Look for folders of training and validation images.

    Raises:
        DataError: Validation images have no classes, or there are several folders for a split.
    """
    bases = [path, *(os.path.join(path, name) for name in _KAGGLE)]
    for base in filter(os.path.isdir, bases):
        train = _find(base, TRAIN_NAMES, _train_split)
        val = _find(base, VAL_NAMES, functools.partial(_val_split, train=train))
        if train is None and labels.list_in(base, ("train",)):
            continue  # lists of both splits; see `data.layouts.file_lists`
        if train is not None or val is not None:
            return _found(path, base, train, val)
    return None


def _found(path: str, base: str, train: Split | None, val: Split | None) -> Found:
    places: dict[str, list[str]] = {}
    for split in (train, val):
        if split is not None:
            by_file = split.labels and f"images labelled by {split.labels.name}"
            what = by_file or _TITLES[split.kind]
            places.setdefault(what, []).append(os.path.relpath(split.folder, path))
    missing = f"put them into {os.path.join(base, '{}')}, or name a path that holds both"
    return Found(
        "class_folders",
        path,
        ", ".join(f"{what} in {' and '.join(where)}" for what, where in places.items()),
        "position of the class in sorted order",
        train,
        val,
        missing={split: missing.format(split) for split in ("train", "val")},
    )


def open_split(found: Found, split: str, options: Options) -> FileTree:
    """List the images of one split.

    Raises:
        DataError: They cannot be listed, have no class, or can hardly be what the user means.
    """
    from data.samples.exclude import read_excluded
    from data.samples.tree import scan, scan_with_gaps

    where: Split = getattr(found, split)
    excluded = read_excluded(options.exclude, split)
    if where.kind == "suffix":
        return _suffixed(where, excluded)
    if where.kind == "labelled":
        return _labelled(where, excluded)
    if options.gaps:
        return scan_with_gaps(where.folder, FLAG, excluded)
    tree = scan(where.folder, FLAG, excluded)
    if tree.oddities.implausible:
        raise DataError(f"{FLAG}: {tree.oddities.implausible}")
    return tree


def _suffixed(where: Split, excluded: Collection[str]) -> FileTree:
    """List images whose names end in _<wnid>."""
    from data.samples.flat import SuffixTree, by_class, images_in, oddities_of, packed_classes

    found = images_in(where.folder, FLAG)
    pairs = []
    for image in found.images:
        match = _SUFFIX.search(image)
        if match is None:
            raise DataError(
                f"{FLAG}: {where.folder}/{image} does not end in _<wnid>, as the other names do; "
                "remove it, or rename it"
            )
        ending = os.path.splitext(image)[1]
        pairs.append((image[: match.start()] + ending, match[1]))
    images = by_class(pairs)
    classes = sorted(images)
    packed, unmatched = packed_classes(classes, images, excluded)
    return SuffixTree(where.folder, classes, packed, unmatched, oddities_of(where.folder, found))


def _labelled(where: Split, excluded: Collection[str]) -> FileTree:
    """List images whose classes a file gives."""
    from data.samples.flat import FlatTree, by_class, images_in, oddities_of, packed_classes

    assert where.labels is not None
    found = images_in(where.folder, FLAG)
    with naming(FLAG):
        class_of = where.labels.classes()
        classes = _class_names(where, class_of)
    unknown = [image for image in found.images if labels.stem(image) not in class_of]
    if unknown:
        raise DataError(
            f"{FLAG}: {where.labels.path} does not give the class of {len(unknown):,} images in "
            f"{where.folder} ({first_few(unknown)}); give the file that belongs to these images, or "
            "remove the images"
        )
    images = by_class((image, class_of[labels.stem(image)]) for image in found.images)
    empty = [name for name in classes if name not in images]
    if empty:
        raise DataError(
            f"{FLAG}: no image in {where.folder} for class {first_few(empty)} of "
            f"{where.labels.path}; copy the missing images"
        )
    packed, unmatched = packed_classes(classes, images, excluded)
    oddities = oddities_of(where.folder, found, _absent(where, found.images, class_of))
    return FlatTree(where.folder, classes, packed, unmatched, oddities)


def _absent(where: Split, images: Collection[str], class_of: dict[str, str]) -> list[str]:
    """Return a note about images that the file names but that are not there."""
    assert where.labels is not None
    absent = sorted(class_of.keys() - {labels.stem(image) for image in images})
    if not absent:
        return []
    return [
        f"{where.folder}: {len(absent):,} images that {where.labels.name} names are missing: "
        f"{first_few(absent)}"
    ]


def _class_names(where: Split, class_of: dict[str, str]) -> list[str]:
    """Return the classes in the order of the labels, and replace numbers in `class_of` by names."""
    from data.samples.class_folders import class_names

    assert where.labels is not None
    if not labels.are_numbers(class_of.values()):
        return sorted(set(class_of.values()))
    if where.train is None:
        return sorted(set(class_of.values()), key=int)
    names = class_names(where.train)
    class_of |= labels.named(class_of, names, where.labels.path)
    return names


def warnings(found: Found, train: FileTree, val: FileTree) -> Sequence[str]:
    """Return what was left out, and whether validation uses the training images."""
    from data.samples.tree import warnings_about

    return warnings_about(train, val, f"{train.root} and {val.root} hold")


def _find(base: str, names: Sequence[str], look: Callable[[str], Split | None]) -> Split | None:
    """Return the one folder of a split.

    Raises:
        DataError: There are several.
    """
    splits: dict[str, Split] = {}
    for name in names:
        folder = os.path.join(base, name)
        if os.path.isdir(folder) and (split := look(folder)) is not None:
            splits.setdefault(os.path.realpath(folder), split)
    if len(splits) > 1:
        there = " and ".join(os.path.basename(split.folder) for split in splits.values())
        raise DataError(
            f"{FLAG}: {base} holds both {there}; give --train-dir and --val-dir, or remove one"
        )
    return next(iter(splits.values()), None)


def _train_split(folder: str) -> Split | None:
    """Return what a folder of training images holds; None if these are not images with classes."""
    kind = kind_of(folder)
    return Split(folder, kind) if kind in ("classes", "suffix") else None


def _val_split(folder: str, train: Split | None) -> Split | None:
    """Return what a folder of validation images holds; None if there are no images.

    Raises:
        DataError: The images have no classes.
    """
    inner = os.path.join(folder, "images")  # Tiny-ImageNet
    annotated = os.path.isfile(os.path.join(folder, labels.TINY)) and os.path.isdir(inner)
    images = inner if annotated else folder
    kind = kind_of(images)
    if kind != "labelled":
        return Split(images, kind) if kind else None
    file = labels.find(images)
    if file is None:
        raise DataError(
            f"{FLAG}: {images} holds images without class folders, and nothing says which class "
            f"each one has; put one of these files into it or beside it: "
            f"{', '.join(labels.ACCEPTED)}"
        )
    by_class = train is not None and train.kind == "classes"
    return Split(images, kind, file, train.folder if train is not None and by_class else None)


def kind_of(folder: str) -> str | None:
    """Return the kind of a `Split`, from the first entries of its folder; None without images."""
    images = []
    with os.scandir(folder) as entries:
        for entry in itertools.islice(entries, _LOOKED_AT):
            if is_ignored(entry.name):
                continue
            if entry.is_dir():
                return "classes"
            if entry.name.lower().endswith(EXTENSIONS):
                images.append(entry.name)
    if not images:
        return None
    suffixed = sum(_SUFFIX.search(image) is not None for image in images)
    return "suffix" if suffixed > len(images) / 2 else "labelled"
