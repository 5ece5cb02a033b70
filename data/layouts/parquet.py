"""Parquet files of images, as the Hugging Face Hub holds ``imagenet-1k``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from data.layouts import FLAG, Found, Options, found_shards, naming, same_files

if TYPE_CHECKING:
    from data.samples.parquet import ParquetSet

HOLDS = "parquet files: train-*.parquet and validation-*.parquet, with the columns image and label"

# A row group of more bytes than this deserves a warning: each worker keeps one in memory.
_LARGE_GROUP = 200e6


def recognise(path: str) -> Found | None:
    """Look for parquet files whose names tell their split."""
    return found_shards(
        "parquet",
        path,
        "parquet files",
        "column label",
        lambda name: name.endswith(".parquet"),
        takes=("label_base",),
    )


def open_split(found: Found, split: str, options: Options) -> ParquetSet:
    """Read the footers and labels of one split's files."""
    from data.samples.parquet import open_parquet

    with naming(FLAG):
        return open_parquet(
            getattr(found, split),
            split,
            options.exclude,
            options.num_classes,
            options.label_base,
        )


def warnings(found: Found, train: ParquetSet, val: ParquetSet) -> Sequence[str]:
    """Return what makes the reading of row groups costly, or the batches one-sided."""
    notes = same_files(found)
    largest = max(train.group_bytes, val.group_bytes)
    convert = f"convert the files: python -m data.prepare --data {found.path} --out NEW"
    if largest > _LARGE_GROUP:
        notes.append(
            f"the largest row group of {found.path} has {largest / 1e6:,.0f} MB, and each worker "
            f"keeps one in memory; {convert}"
        )
    if train.sorted_by_class:
        notes.append(
            f"{found.path} is sorted by class, and the images of a row group stay together, so a "
            f"step sees few classes; {convert}"
        )
    return notes
