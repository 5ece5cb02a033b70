"""Lists of images: ``train_list.txt`` and ``val_list.txt`` with lines ``<path> <label>``."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data import DataError
from data.layouts import FLAG, Found, Options, class_folders, labels, naming
from data.samples.listing import first_few

if TYPE_CHECKING:
    from data.samples.class_folders import Oddities
    from data.samples.tree import FileTree

HOLDS = "train_list.txt and val_list.txt with lines <path> <label>; or the path of the first list"


@dataclass(frozen=True)
class Lists:
    """The list of one split, and where its images may be.

    Attributes:
        path: The list.
        names: Usual names of the split's folder.
        train: The list of training images, which gives the names of classes in numbers.
    """

    path: str
    names: tuple[str, ...]
    train: str | None = None


def recognise(path: str) -> Found | None:
    """Look for a pair of lists. A path may also be one of the lists."""
    train, val = _of_file(path) if os.path.isfile(path) else _in_folder(path)
    if train is None and val is None:
        return None
    lists = " and ".join(os.path.basename(each) for each in (train, val) if each)
    return Found(
        "file_lists",
        path,
        f"images listed in {lists}",
        "those of the lists, in sorted order",
        train and Lists(train, class_folders.TRAIN_NAMES),
        val and Lists(val, class_folders.VAL_NAMES, train),
        missing={
            "train": "put the list of training images beside it, for example train_list.txt",
            "val": "put the list of validation images beside it, for example val_list.txt",
        },
    )


def _in_folder(folder: str) -> tuple[str | None, str | None]:
    """Return the lists in a folder. Lists beside class folders only repeat what the folders say."""
    if class_folders.recognise(folder) is not None:
        return None, None
    return labels.list_in(folder, ("train",)), labels.list_in(folder, labels.VAL)


def _of_file(path: str) -> tuple[str | None, str | None]:
    """Return a list that the user names, and the list of the other split beside it."""
    folder, name = os.path.split(path)
    if not name.endswith(".txt"):
        return None, None
    if "train" not in name:
        return None, path if any(split in name for split in labels.VAL) else None
    head, _, tail = name.rpartition("train")
    others = [os.path.join(folder, head + split + tail) for split in labels.VAL]
    return path, next(filter(os.path.isfile, others), None)


def open_split(found: Found, split: str, options: Options) -> FileTree:
    """Read the list of one split.

    Raises:
        DataError: The list cannot be read, or its images are not where they can be expected.
    """
    from data.samples.exclude import read_excluded
    from data.samples.flat import FlatTree, by_class, packed_classes
    from data.samples.tree import FileTree

    where: Lists = getattr(found, split)
    with naming(FLAG):
        pairs = labels.read_pairs(where.path)
    if not pairs:
        raise DataError(f"{FLAG}: {where.path} names no images")
    root = _root(where, pairs[0][0])
    excluded = read_excluded(options.exclude, split)
    folders = _class_folders(pairs)
    if folders is None and where.train is not None:
        pairs, classes = _named_as_for_training(where.path, pairs, where.train)
    else:
        classes = _in_order({label for _, label in pairs})
    if folders is None:
        head = _common_folder(pairs)
        root = os.path.join(root, head)
        _refuse_two_classes(where.path, pairs)
        images = by_class((os.path.basename(i) if head else i, name) for i, name in pairs)
        packed, unmatched = packed_classes(classes, images, excluded)
        return FlatTree(root, classes, packed, unmatched, _repeated(where.path, images))
    head, folder_of = folders
    images = by_class((os.path.basename(image), folder_of[label]) for image, label in pairs)
    classes = [folder_of[label] for label in classes]
    packed, unmatched = packed_classes(classes, images, excluded)
    oddities = _repeated(where.path, images)
    return FileTree(os.path.join(root, head), classes, packed, unmatched, oddities)


def _common_folder(pairs: Sequence[tuple[str, str]]) -> str:
    """Return the folder that all images of a list lie in; "" if they lie in several."""
    folders = {os.path.dirname(image) for image, _ in pairs}
    only = folders.pop()
    return "" if folders else only


def _refuse_two_classes(path: str, pairs: Sequence[tuple[str, str]]) -> None:
    class_of = dict(pairs)
    double = [image for image, name in pairs if class_of[image] != name]
    if double:
        raise DataError(f"{FLAG}: {path} gives these images two classes: {first_few(double)}")


def _class_folders(pairs: Sequence[tuple[str, str]]) -> tuple[str, dict[str, str]] | None:
    """Return what leads to the class folders, and the folder of each label.

    The result is None if the images of a label do not all lie in a folder of their own.
    """
    folder_of: dict[str, str] = {}
    for image, label in pairs:
        folder = os.path.dirname(image)
        if folder_of.setdefault(label, folder) != folder:
            return None
    heads = {os.path.dirname(folder) for folder in folder_of.values()}
    if len(heads) > 1 or len(set(folder_of.values())) < len(folder_of) or "" in folder_of.values():
        return None
    head = heads.pop()
    return (
        f"{head}/" if head else "",
        {label: os.path.basename(folder) for label, folder in folder_of.items()},
    )


def _in_order(names: Collection[str]) -> list[str]:
    """Return labels, which are names or numbers, in the order of the classes."""
    return sorted(names, key=int if labels.are_numbers(names) else str)


def _named_as_for_training(
    path: str, pairs: Sequence[tuple[str, str]], train: str
) -> tuple[list[tuple[str, str]], list[str]]:
    """Give the classes of a list without class folders the names that they have for training.

    Lists often number the classes of images in ``train/<class>/`` and in a flat ``val/``.

    Args:
        path: The list.
        pairs: (image, label) of each line.
        train: The list of training images.

    Returns:
        (image, name of the class) of each line, and the names in the order of the classes.

    Raises:
        DataError: A label is not in the list of training images.
    """
    with naming(FLAG):
        training = labels.read_pairs(train)
    folders = _class_folders(training)
    order = _in_order({label for _, label in training})
    name_of = folders[1] if folders else {label: label for label in order}
    name_of |= {name: name for name in name_of.values()}
    unknown = sorted({label for _, label in pairs} - name_of.keys())
    if unknown:
        raise DataError(
            f"{FLAG}: {path} has classes that {train} does not have: {first_few(unknown)}; both "
            "lists must name the classes in the same way"
        )
    named = [(image, name_of[label]) for image, label in pairs]
    used = {name for _, name in named}
    return named, [name_of[label] for label in order if name_of[label] in used]


def _root(where: Lists, image: str) -> str:
    """Return the folder that the paths of a list begin at.

    Raises:
        DataError: The first image lies in none of the usual places.
    """
    folder = os.path.dirname(where.path)
    parents = [folder, os.path.dirname(os.path.abspath(folder))]
    places = [os.path.join(parent, name) for parent in parents for name in ("", *where.names)]
    for place in places:
        if os.path.lexists(os.path.join(place, image)):
            return place
    raise DataError(
        f"{FLAG}: {where.path} names {image}, which is not in {first_few(places)}; put the list "
        "into the folder that its paths begin at"
    )


def _repeated(path: str, images: Mapping[str, Sequence[str]]) -> Oddities:
    """Return a note about images that a list names more than once."""
    from data.samples.class_folders import Oddities

    double = [
        image
        for names in images.values()
        for image, following in itertools.pairwise(names)
        if image == following
    ]
    note = f"{path} names {len(double):,} images more than once: {first_few(double)}"
    return Oddities((note,) if double else ())


def warnings(found: Found, train: FileTree, val: FileTree) -> Sequence[str]:
    """Return which images are listed twice, and whether both lists name the same images."""
    from data.samples.tree import are_copies, warnings_about

    lists = f"{found.train.path} and {found.val.path}"
    return warnings_about(train, val, f"{lists} name", are_copies)
