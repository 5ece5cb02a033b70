"""TFRecords with index files, as ``python -m data.make_tfrecords`` writes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data.layouts import FLAG, Found, Options

if TYPE_CHECKING:
    from data.samples.records import RecordSet

HOLDS = "TFRecords: train/*, validation/* and idx_files (python -m data.make_tfrecords)"


def recognise(path: str) -> Found | None:
    """Look for index files beside folders of record files."""
    from data.samples.record_files import INDEX_FOLDER, SPLITS

    folders = [split for split in SPLITS if os.path.isdir(os.path.join(path, split))]
    if not folders or not os.path.isdir(os.path.join(path, INDEX_FOLDER)):
        return None
    return Found(
        "records",
        path,
        f"TFRecords in {' and '.join(folders)}",
        "as in the records",
        train=path if "train" in folders else None,
        val=path if "validation" in folders else None,
        takes=("block", "label_base"),
    )


def open_split(found: Found, split: str, options: Options) -> RecordSet:
    """Open the records of one split."""
    from data.samples.records import open_records

    if split == "train":
        return open_records(
            found.path, "train", FLAG, options.exclude, options.block, options.label_base
        )
    return open_records(
        found.path, "validation", FLAG, options.exclude, label_base=options.label_base
    )


def warnings(found: Found, train: RecordSet, val: RecordSet) -> Sequence[str]:
    """Return whether the splits share images, and whether the classes were not counted."""
    from data.samples.record_files import record_warnings

    return record_warnings(found.path, len(train))
