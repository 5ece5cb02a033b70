"""The layout and the speed of the images at ``--data``, the costs and gains of a conversion, and the conversion."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from data import DataError, layouts
from data.layouts import Found, Options
from data.prepare.convert import convert
from data.prepare.decompress import decompress_all, packed_files, packed_size
from data.prepare.speed import Speed, measure
from data.samples import NumberedSamples
from data.samples.flat_records import make_index as index_records
from data.samples.tars import make_index as index_tars
from data.tooling.pool import Pool

# A gain in speed below this is within the differences between two measurements.
_NOTABLE = 1.15

_INDEX = {"web_dataset": index_tars, "flat_records": index_records}


def advise(options: argparse.Namespace, pool: Pool) -> None:
    """Print the layout of ``--data`` and what a conversion gains. Convert it if ``--out`` is given.

    Raises:
        DataError: The data cannot be used, or the disk is too small.
    """
    found = layouts.find(options.data)
    packed = packed_files(found)
    if packed:
        _unpack(options, found, packed, pool)
        return
    opened = Options(options.exclude, label_base=options.label_base, index_dir=options.index_dir)
    _index(found, options.index_dir, pool)
    train, val = layouts.open_both(found, opened)
    print(f"{options.data}: {found.line(train, val)}")
    for note in layouts.layout(found.layout).warnings(found, train, val):
        print(f"note: {note}")
    if found.layout == "records":
        print("These are TFRecords with index files: there is nothing to convert.")
        return
    if options.out:
        os.makedirs(options.out, exist_ok=True)
    speed = measure(train, options.out)
    total = len(train) + len(val)
    print(table(speed))
    print(verdict(speed, total, train))
    if not options.out:
        print(f"To convert: python -m data.prepare --data {options.data} --out NEW")
        return
    _refuse_small_disk(options.out, speed.image_bytes * total)
    convert(found, (train, val), opened, options.out, options.images_per_shard, pool)
    print(f"Train with --data {options.out}")


def _unpack(options: argparse.Namespace, found: Found, packed: Sequence[str], pool: Pool) -> None:
    size = packed_size(found)
    print(
        f"{options.data}: {found.title}, {len(packed):,} of them compressed, {size / 1e9:,.2f} GB. "
        "Single images cannot be read from compressed files. Images hardly shrink by compression, "
        "so plain files need about the same space."
    )
    if not options.out:
        print(f"To unpack them: python -m data.prepare --data {options.data} --out NEW")
        return
    _refuse_small_disk(options.out, size)
    decompress_all(found, options.out, pool)
    print(f"Train with --data {options.out}")


def _index(found: Found, index_dir: str | None, pool: Pool) -> None:
    """Make the indexes that the layout needs, with all processes."""
    if found.layout not in _INDEX:
        return

    def index_all(function: Callable[[str], Any], paths: Sequence[str]) -> Iterable[Any]:
        tasks = [(function, number, path) for number, path in enumerate(paths)]
        return (result for _, result in sorted(pool.work(_numbered, tasks, "files"), key=_first))

    for split in layouts.SPLITS:
        if getattr(found, split):
            _INDEX[found.layout](found.path, getattr(found, split), split, index_dir, index_all)


def _numbered(task: tuple[Callable[[str], Any], int, str]) -> tuple[int, Any]:
    function, number, path = task
    return number, function(path)


def _first(pair: tuple[int, Any]) -> int:
    return pair[0]


def table(speed: Speed) -> str:
    """Format the speeds for people."""
    rows = [
        ("as they are, first read", speed.first, "images per second"),
        ("as they are, from memory", speed.again, "images per second of CPU time"),
        ("as TFRecords, from memory", speed.as_records, "images per second of CPU time"),
    ]
    lines = [f"{speed.images:,} images in the order of training, by one process, 224 pixels:"]
    return "\n".join(lines + [f"  {name:26}{rate:8,.0f} {unit}" for name, rate, unit in rows])


def verdict(speed: Speed, total: int, train: NumberedSamples) -> str:
    """Say what a conversion costs, and whether it is worth that.

    Args:
        speed: The speeds.
        total: Number of images in both splits.
        train: The training images.
    """
    gain = speed.as_records / speed.again
    reasons = []
    if gain > _NOTABLE:
        reasons.append(f"reading is {gain:.2f} times as fast")
    if not isinstance(getattr(train, "block", 1), int):
        reasons.append("single images are shuffled instead of row groups")
    minutes = total / speed.convert / 60
    cost = (
        f"A conversion to TFRecords needs {speed.image_bytes * total / 1e9:,.2f} GB of disk and "
        f"about {minutes:,.1f} minutes of one process."
    )
    if not reasons:
        return f"{cost} It gains nothing: the data are fast as they are."
    return f"{cost} It gains this: {'; '.join(reasons)}."


def _refuse_small_disk(folder: str, needed: float) -> None:
    """Raise DataError if the disk of `folder` has less than `needed` bytes free."""
    place = os.path.abspath(folder)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DataError(
            f"--out: {folder} needs about {needed / 1e9:,.1f} GB, but only {free / 1e9:,.1f} GB are "
            "free; name a folder on another disk"
        )
