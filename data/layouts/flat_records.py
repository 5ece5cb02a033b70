"""TFRecords without index files: those of TensorFlow Datasets, and files flat in one folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data.layouts import FLAG, Found, Options, found_shards, naming, same_files

if TYPE_CHECKING:
    from data.samples.records import RecordSet

HOLDS = (
    "TFRecords of TensorFlow Datasets, or train-00000-of-01024, ... and validation-* in one folder"
)


def recognise(path: str) -> Found | None:
    """Look for record files whose names tell their split."""
    from data.samples.record_files import INDEX_FOLDER, is_record_file

    path_of_files = _version_folder(path)
    if os.path.isdir(os.path.join(path_of_files, INDEX_FOLDER)):
        return None  # the layout `records`
    return found_shards(
        "flat_records",
        path_of_files,
        "TFRecords without index files",
        "as in the records",
        is_record_file,
        takes=("block", "label_base", "index_dir"),
    )


def _version_folder(path: str) -> str:
    """Return the folder of the files; TensorFlow Datasets makes one for each version of a set."""
    inner = [
        folder
        for name in (sorted(os.listdir(path)) if os.path.isdir(path) else [])
        if os.path.isfile(os.path.join(folder := os.path.join(path, name), "dataset_info.json"))
    ]
    return inner[0] if len(inner) == 1 else path


def open_split(found: Found, split: str, options: Options) -> RecordSet:
    """Open one split, and index its files if that was not done before."""
    from data.samples.flat_records import open_flat_records

    with naming(FLAG):
        return open_flat_records(
            found.path,
            getattr(found, split),
            split,
            options.exclude,
            options.block if split == "train" else 1,
            options.num_classes,
            options.label_base,
            options.index_dir,
        )


def warnings(found: Found, train: RecordSet, val: RecordSet) -> Sequence[str]:
    """Return whether both splits share files."""
    return same_files(found)
