"""The layouts of files that ``--data PATH`` recognises.

Each layout is one module in this package, and one row in `MODULES`. A module defines:

* ``HOLDS``: what such a path holds, in a few words. The error for an unknown path lists it.
* ``recognise(path)``: what was found, or None. It reads few folders and opens no image.
* ``open_split(found, split, options)``: the samples of ``train`` or ``val``.
* ``warnings(found, train, val)``: what looks wrong about the samples, and what was left out.

The samples are `EncodedSamples`, so that both scripts and all tools can read them. Importing this
loads neither torch nor NumPy.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from data import DataError, FlagError

if TYPE_CHECKING:
    from data.samples import NumberedSamples

FLAG = "--data"
SPLITS = ("train", "val")

# Every layout. Their order is the order in messages.
MODULES = ("class_folders", "file_lists", "records", "flat_records", "parquet", "web_dataset")

# Those whose images are files of their own: the samples are a `FileTree`.
OF_FILES = ("class_folders", "file_lists")


@dataclass(frozen=True)
class Options:
    """Flags of the user that concern how samples are opened.

    Attributes:
        exclude: The list of images to leave out (``--exclude``).
        block: Number of consecutive samples to read in one piece (``--shuffle-window``).
        label_base: Label of the first class (``--label-base``).
        index_dir: Folder for an index that must be made (``--index-dir``).
        num_classes: Number of classes, if it is known from the training images.
        gaps: Whether empty class folders and links without a target are accepted, as data.check
            needs it, which reports them.
    """

    exclude: str | None = None
    block: int = 1
    label_base: int | None = None
    index_dir: str | None = None
    num_classes: int | None = None
    gaps: bool = False


@dataclass(frozen=True)
class Found:
    """What was found at a path.

    Attributes:
        layout: Name of the module that recognised it.
        path: The path as the user gave it.
        title: What was found, for example ``class folders in train and val``.
        rule: Where the labels come from.
        train: What `open_split` of the module needs for the training images; None if there are none.
        val: The same for the validation images.
        takes: Names of the fields of `Options`, besides exclude, that have an effect.
        missing: What to do about a split that is None.
    """

    layout: str
    path: str
    title: str
    rule: str
    train: Any
    val: Any
    takes: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)

    def line(self, train: NumberedSamples | None, val: NumberedSamples | None) -> str:
        """Return one line that says what was found, with counts and the rule for the labels."""
        opened = {"training": train, "validation": val}
        counts = [f"{len(found):,} images for {use}" for use, found in opened.items() if found]
        classes = next((found.num_classes for found in opened.values() if found), 0)
        return f"{self.title}: {', '.join(counts)}, {classes:,} classes; labels: {self.rule}"


class Layout(Protocol):
    """A module of this package."""

    HOLDS: str

    def recognise(self, path: str) -> Found | None:
        """Return what was found, or None if `path` does not have this layout.

        Raises:
            DataError: It has this layout but cannot be used; the message says what to do.
        """
        ...

    def open_split(self, found: Found, split: str, options: Options) -> NumberedSamples:
        """Open the samples of ``train`` or ``val``; raise DataError if they cannot be used."""
        ...

    def warnings(self, found: Found, train: Any, val: Any) -> Sequence[str]:
        """Return what looks wrong about the samples of `open_split`, and what was left out."""
        ...


@contextmanager
def naming(flag: str) -> Iterator[None]:
    """Let the message of a DataError in the block begin with `flag`, or with another flag."""
    try:
        yield
    except DataError as error:
        if str(error).startswith("--"):
            raise
        raise type(error)(f"{flag}: {error}") from error


def layout(name: str) -> Layout:
    """Return the module of a layout."""
    return cast("Layout", importlib.import_module(f"data.layouts.{name}"))


def find(path: str) -> Found:
    """Recognise the layout of the images at `path`.

    Raises:
        FlagError: The path does not exist.
        DataError: No layout fits, or several fit. The message describes what was found.
    """
    if not os.path.exists(path):
        raise FlagError(f"{FLAG} {path} does not exist")
    try:
        fits = [found for name in MODULES if (found := layout(name).recognise(path)) is not None]
        if not fits:
            raise DataError(
                f"{FLAG} {path} is not a known layout: it {_contents(path)}; {_fix(path)}"
            )
    except OSError as error:
        raise DataError(f"{FLAG}: {error.filename} cannot be read: {error.strerror}") from error
    if len(fits) > 1:
        titles = "; ".join(found.title for found in fits)
        raise DataError(
            f"{FLAG} {path} fits several layouts: {titles}. Name a path that holds one of them, or "
            "give --train-dir and --val-dir"
        )
    return fits[0]


def _fix(path: str) -> str:
    """Say what to do with a path that no layout fits."""
    from data.layouts.advice import advice

    accepted = "".join(f"\n  {layout(name).HOLDS}" for name in MODULES)
    return advice(path) or f"accepted are:{accepted}"


def open_split(found: Found, split: str, options: Options) -> NumberedSamples:
    """Open the samples of ``train`` or ``val``.

    Raises:
        DataError: They are missing or cannot be used.
    """
    _refuse_missing(found, split)
    try:
        return layout(found.layout).open_split(found, split, options)
    except OSError as error:
        raise DataError(f"{FLAG}: {error.filename} cannot be read: {error.strerror}") from error


def _refuse_missing(found: Found, split: str) -> None:
    if getattr(found, split) is None:
        fix = found.missing.get(split, "name a path that holds both")
        raise DataError(f"{FLAG} {found.path}: {found.title}, but no images for {split}; {fix}")


def open_both(found: Found, options: Options) -> tuple[NumberedSamples, NumberedSamples]:
    """Open training and validation samples.

    Raises:
        DataError: They are missing, cannot be used, or have different classes.
    """
    for split in SPLITS:  # before an index is made, which can take minutes
        _refuse_missing(found, split)
    train = open_split(found, "train", options)
    val = open_split(found, "val", options_for_val(options, train))
    refuse_other_classes(found, train, val)
    return train, val


def options_for_val(options: Options, train: NumberedSamples) -> Options:
    """Return the options for the validation images.

    What the training images show about labels holds for both splits: few images can lack a class.
    """
    label_base = getattr(train, "label_base", options.label_base)
    return replace(options, num_classes=train.num_classes, label_base=label_base)


@functools.lru_cache(maxsize=2)
def opened(path: str, split: str, options: Options) -> NumberedSamples:
    """Recognise a path and open a split; each process does this once."""
    return open_split(find(path), split, options)


def refuse_other_classes(found: Found, train: NumberedSamples, val: NumberedSamples) -> None:
    """Raise DataError unless training and validation have the same classes."""
    from data.samples.listing import first_few

    names = list(train.class_names), list(val.class_names)
    if train.num_classes == val.num_classes and (names[0] == names[1] or not all(names)):
        return
    only_train, only_val = (
        sorted(set(names[0]) - set(names[1])),
        sorted(set(names[1]) - set(names[0])),
    )
    raise DataError(
        f"{FLAG} {found.path}: training has {train.num_classes:,} classes and validation has "
        f"{val.num_classes:,}, which must be the same; otherwise a label means different classes. "
        f"Only in train: {first_few(only_train)}; only in val: {first_few(only_val)}"
    )


def found_shards(
    layout: str,
    path: str,
    title: str,
    rule: str,
    is_shard: Callable[[str], bool],
    takes: tuple[str, ...],
    or_test: bool = False,
) -> Found | None:
    """Recognise a set of large files whose names, or whose folders' names, tell their split.

    Args:
        layout: Name of the module.
        path: A folder.
        title: What such files are.
        rule: Where the labels come from.
        is_shard: Tells whether a file of this name is one of the set.
        takes: As in `Found`.
        or_test: Whether a split ``test`` counts as validation where there is no other.
    """
    from data.samples.shard_names import find_shards

    if not os.path.isdir(path):
        return None
    files = find_shards(path, is_shard)
    val = files.get("validation") or (files.get("test") if or_test else None)
    if not files.get("train") and not val:
        return None
    counts = [
        f"{len(paths):,} for {split}"
        for split, paths in (("training", files.get("train")), ("validation", val))
        if paths
    ]
    return Found(
        layout, path, f"{title} ({', '.join(counts)})", rule, files.get("train"), val, takes
    )


def same_files(found: Found) -> list[str]:
    """Return a warning if both splits have a file in common."""
    common = set(map(os.path.realpath, found.train)) & set(map(os.path.realpath, found.val))
    if not common:
        return []
    return [
        f"{min(common)} is used for training and validation, so validation says nothing about new "
        "images"
    ]


def _contents(path: str) -> str:
    """Describe the content of a path in a few words."""
    from data.samples.listing import first_few, is_ignored

    if not os.path.isdir(path):
        return "is a file"
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            if not is_ignored(entry.name):
                (folders if entry.is_dir() else files).append(entry.name)
    if not folders and not files:
        return "is an empty folder"
    return (
        f"holds {len(folders):,} folders ({first_few(sorted(folders))}) and {len(files):,} files "
        f"({first_few(sorted(files))})"
    )
