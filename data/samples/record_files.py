"""The files of a set of TFRecords: record files, index files and the manifest.

A folder (``--data-dir`` or ``--records``) holds train/*, validation/*, idx_files/train/* and
idx_files/validation/*, and perhaps manifest.json.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection

from data import DataError
from data.tooling.atomic import read_json

SPLITS = ("train", "validation")
INDEX_FOLDER = "idx_files"
MANIFEST = "manifest.json"

IMAGENET_CLASSES = 1000

_SHARD = re.compile(r"(.+)-(\d{5,6})-of-(\d{5,6})")


def missing_shards(names: Collection[str]) -> list[str]:
    """Return the missing files, sorted, if some are named ``<set>-<number>-of-<total>``."""
    parts = [match.groups() for name in names if (match := _SHARD.fullmatch(name))]
    expected = {
        f"{stem}-{number:0{len(total)}d}-of-{total}"
        for stem, total in {(stem, total) for stem, _, total in parts}
        for number in range(int(total))
    }
    return sorted(expected - set(names))


def shard_files(folder: str, split: str) -> list[tuple[str, str]]:
    """Return (record file, index file) of each shard of a split, sorted by name.

    An index file has the name of its record file, with or without ``.idx`` appended.

    Raises:
        DataError: A folder is missing or empty, or the two sets of names do not match.
    """
    fix = f"index them: python -m data.make_tfrecords --from-tfrecords --data-dir {folder}"
    records = _names(os.path.join(folder, split), "put the record files there")
    indices = _names(os.path.join(folder, INDEX_FOLDER, split), fix)
    by_record = {name.removesuffix(".idx"): name for name in indices}
    if set(by_record) != set(records) or len(by_record) != len(indices):
        odd = sorted(set(by_record) ^ set(records)) or indices
        raise DataError(
            f"{folder}: the record files of {split} and their index files do not match, "
            f"for example {odd[0]}; {fix}"
        )
    return [
        (
            os.path.join(folder, split, name),
            os.path.join(folder, INDEX_FOLDER, split, by_record[name]),
        )
        for name in records
    ]


def _names(folder: str, fix: str) -> list[str]:
    try:
        names = visible_names(folder)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; {fix}") from error
    if not names:
        raise DataError(f"{folder} is empty; {fix}")
    return names


def visible_names(folder: str) -> list[str]:
    """Return the names in a folder, sorted, without hidden ones."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def class_count(folder: str) -> int:
    """Return the number of classes that the manifest gives, or ImageNet's if there is no manifest.

    Raises:
        DataError: There is a manifest, but it gives no number.
    """
    path = os.path.join(folder, MANIFEST)
    if not os.path.exists(path):
        return IMAGENET_CLASSES
    try:
        return int(read_json(path)["num_classes"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged_manifest(folder) from error


def shard_hashes(folder: str, split: str) -> str:
    """Return the manifest's entries for a split's record files as text; "" without a manifest."""
    manifest = read_json(os.path.join(folder, MANIFEST)) or {}
    try:
        return repr(manifest.get("splits", {}).get(split, {}).get("shards", ""))
    except AttributeError as error:
        raise damaged_manifest(folder) from error


def damaged_manifest(folder: str) -> DataError:
    """Return the error for a manifest that cannot be used."""
    return DataError(
        f"{os.path.join(folder, MANIFEST)} is damaged or not a manifest of records; write it again "
        f"with python -m data.make_tfrecords --from-tfrecords --data-dir {folder}"
    )
