"""Which files of a folder belong to which split, and which are missing, by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection

from data import SetError
from data.samples.listing import first_few, is_ignored

SPLITS = ("train", "validation", "test")

# A word of a name that tells the split: train-00000-of-00294.parquet, imagenet1k-validation-00.tar,
# imagenet2012-train.tfrecord-00000-of-01024, val.parquet.
_WORDS = {"train": "train", "training": "train", "val": "validation", "valid": "validation",
          "validation": "validation", "test": "test"}  # fmt: skip
_SPLIT = re.compile(r"(?:^|[-_.])(" + "|".join(_WORDS) + r")(?=$|[-_.\d])")

# Hugging Face has written train-00000-of-00001-1359597a978bc4fa.parquet, which ends with a hash.
_OF_TOTAL = re.compile(r"(.+)-(\d{5,6})-of-(\d{5,6})(?:-[0-9a-f]{16})?(\.\w+)?")
_NUMBERED = re.compile(r"(.*?)(\d+)(\.[\w.]+)?")

# A larger number is a date or a WordNet ID, not the number of a file in a set.
_LARGEST_NUMBER = 999_999

# First bytes of what Git gives instead of a large file that was not downloaded.
_LFS = b"version https://git-lfs"


def split_of(name: str) -> str | None:
    """Return the split that a file or folder belongs to by its name; None if it tells none.

    >>> split_of("imagenet1k-validation-00.tar")
    'validation'
    """
    found = _SPLIT.search(name.lower())
    return _WORDS[found.group(1)] if found else None


def find_shards(folder: str, is_shard: Callable[[str], bool]) -> dict[str, list[str]]:
    """Return the paths of each split's files, sorted by name; a split without files is left out.

    The files lie in `folder` with the split in their names, or in a folder for each split. All of
    this may lie in an inner folder `data` or `default`, as on the Hugging Face Hub.

    Args:
        folder: A folder.
        is_shard: Tells whether a file of this name is one of the set.

    Raises:
        OSError: The folder cannot be listed.
    """
    for root in (folder, os.path.join(folder, "data"), os.path.join(folder, "default")):
        if os.path.isdir(root) and (found := _shards_in(root, is_shard)):
            return found
    return {}


def _shards_in(root: str, is_shard: Callable[[str], bool]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sorted(os.listdir(root)):
        split = split_of(name)
        if split is None or is_ignored(name):
            continue
        path = os.path.join(root, name)
        if is_shard(name):
            found.setdefault(split, []).append(path)
        elif os.path.isdir(path):
            inner = [n for n in sorted(os.listdir(path)) if is_shard(n) and not is_ignored(n)]
            found.setdefault(split, []).extend(os.path.join(path, n) for n in inner)
    return {split: found[split] for split in SPLITS if found.get(split)}


def missing_shards(names: Collection[str]) -> list[str]:
    """Return the missing files, sorted, if some are named ``<set>-<number>-of-<total>``.

    The names are without the hashes that such names can end with.
    """
    parts = [match.groups("") for name in names if (match := _OF_TOTAL.fullmatch(name))]
    expected = {
        f"{stem}-{number:0{len(total)}d}-of-{total}{ending}"
        for stem, total, ending in {(stem, total, ending) for stem, _, total, ending in parts}
        for number in range(int(total))
    }
    there = {f"{stem}-{number}-of-{total}{ending}" for stem, number, total, ending in parts}
    return sorted(expected - there)


def _gaps(names: Collection[str]) -> list[str]:
    """Return the missing files, sorted, if all names differ in a number only: a-0.tar, a-1.tar."""
    parts = [match.groups("") for name in names if (match := _NUMBERED.fullmatch(name))]
    if len(parts) < len(names) or len({(stem, ending) for stem, _, ending in parts}) != 1:
        return []
    stem, _, ending = parts[0]
    numbers = {int(number) for _, number, _ in parts}
    if max(numbers) > _LARGEST_NUMBER:
        return []
    width = min(len(number) for _, number, _ in parts)
    absent = sorted(set(range(max(numbers) + 1)) - numbers)
    # A set may count from 1.
    absent = absent[1:] if absent[:1] == [0] else absent
    return [f"{stem}{number:0{width}d}{ending}" for number in absent]


def refuse_incomplete(paths: Collection[str]) -> None:
    """Refuse the files of a split if they are not one complete set.

    Raises:
        SetError: Files are missing by their names, belong to several sets, lie in several folders,
            are empty, or cannot be read.
    """
    names = {os.path.basename(path) for path in paths}
    folder, *others = sorted({os.path.dirname(path) for path in paths})
    if others:
        raise SetError(
            f"{folder} and {others[0]} hold files of the same split, by their names; keep the files "
            "of a split in one folder, and rename or move the other folder"
        )
    sets = {found for name in names if (found := _set_of(name))}
    if len(sets) > 1:
        raise SetError(
            f"{folder} holds files of several sets, by their names: {first_few(sorted(sets))}; move "
            "one set to another folder, or, if they are one set, give all files the same name "
            "before the number"
        )
    has_totals = any(map(_OF_TOTAL.fullmatch, names))
    missing = missing_shards(names) if has_totals else _gaps(names)
    if missing:
        raise SetError(
            f"{folder}: {first_few(missing)} missing, according to the files' names; download or "
            "copy the missing files (or rename the others, if you want only a part)"
        )
    for path in paths:
        try:
            if os.path.getsize(path) < 1024:
                _refuse_stub(path)
        except OSError as error:
            raise unreadable(path, error) from error


def unreadable(path: str, error: OSError) -> SetError:
    """Return the error for a large file that cannot be read."""
    if os.path.islink(path) and not os.path.exists(path):
        return SetError(
            f"{path} is a link to {os.readlink(path)}, which does not exist; download or copy the "
            "file again"
        )
    return SetError(f"{path} cannot be read: {error.strerror}")


def _set_of(name: str) -> str | None:
    """Return the set that a file belongs to by its name; None if the name does not tell it.

    >>> _set_of("train-00000-of-00294.parquet"), _set_of("imagenet1k-train-0000.tar")
    ('train-*-of-00294.parquet', 'imagenet1k-train*')
    """
    if of_total := _OF_TOTAL.fullmatch(name):
        stem, _, total, ending = of_total.groups("")
        return f"{stem}-*-of-{total}{ending}"
    split = _SPLIT.search(name.lower())
    return f"{name[: split.end(1)]}*" if split else None


def _refuse_stub(path: str) -> None:
    with open(path, "rb") as file:
        start = file.read(len(_LFS))
    if not start:
        raise SetError(f"{path} is empty; download or copy it again")
    if start == _LFS:
        raise SetError(
            f"{path} is a pointer of Git LFS, not the file itself; download the files: git lfs pull"
        )
