"""Images in any layout become TFRecords with index files and a manifest."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data import DataError, layouts
from data.layouts import Found, Options
from data.loader.order import even_bounds
from data.make_tfrecords import manifest
from data.make_tfrecords.shards import Shard, write_images
from data.samples import NumberedSamples
from data.tooling.atomic import locked, read_json
from data.tooling.pool import Pool

# Names of the splits: in layouts, and in folders of records.
SPLITS = {"train": "train", "val": "validation"}


@dataclass(frozen=True)
class Part:
    """Task: one record file of consecutive images."""

    found: Found
    options: Options
    split: str
    numbers: range
    shard: Shard


def write_part(part: Part) -> dict[str, Any]:
    """Write one record file; return its note."""
    samples = layouts.opened(part.found.path, part.split, part.options)
    return write_images(part.shard, _images(samples, part.numbers))


def _images(
    samples: NumberedSamples, numbers: range
) -> Iterator[tuple[bytes, int, str, str | None]]:
    names = list(samples.class_names)
    for number in numbers:
        encoded, label = samples.encoded(number)
        yield encoded, label + 1, samples.name(number), names[label] if names else None


def convert(
    found: Found,
    samples: tuple[NumberedSamples, NumberedSamples],
    options: Options,
    folder: str,
    images_per_shard: int,
    pool: Pool,
) -> None:
    """Write both splits as records under `folder`, in the order of the images.

    Training shuffles records one by one, so their order in the files does not matter.

    Raises:
        DataError: `folder` holds other records, or an image cannot be read.
    """
    settings = {
        "data": "-".join(each.fingerprint for each in samples),
        "images_per_shard": images_per_shard,
    }
    os.makedirs(folder, exist_ok=True)
    with locked(folder):
        _refuse_others(folder, settings)
        options = layouts.options_for_val(options, samples[0])  # for both splits
        parts = [
            part
            for split, mine in zip(SPLITS, samples, strict=True)
            for part in _parts(found, options, split, len(mine), folder, images_per_shard)
        ]
        shards = [part.shard for part in parts]
        if _is_complete(folder, shards, settings):
            print(f"{folder}: the records are already there")
            return
        manifest.start(folder, settings)
        left = [part for part in parts if not manifest.is_finished(part.shard)]
        for _ in pool.work(write_part, left, "record files"):
            pass
        manifest.write_manifest(folder, shards, list(samples[0].class_names) or None, settings)
    total = sum(len(each) for each in samples)
    print(f"{folder}: {total:,} images in {len(shards):,} record files, {len(left):,} written now")


def _parts(
    found: Found, options: Options, split: str, count: int, folder: str, images_per_shard: int
) -> Iterator[Part]:
    bounds = even_bounds(count, images_per_shard)
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        name = f"{SPLITS[split]}-{number:05d}-of-{len(bounds) - 1:05d}"
        shard = Shard(folder, SPLITS[split], name)
        yield Part(found, options, split, range(start, stop), shard)


def _is_complete(folder: str, shards: list[Shard], settings: dict[str, Any]) -> bool:
    """Whether all records and the manifest are there."""
    done = manifest.read_manifest(folder)
    if done.get("settings") != settings:
        return False
    sizes = {
        (split, entry["name"]): entry["bytes"]
        for split in SPLITS.values()
        for entry in done["splits"][split]["shards"]
    }
    return all(manifest.is_intact(each, sizes.get((each.split, each.name), -1)) for each in shards)


def _refuse_others(folder: str, settings: dict[str, Any]) -> None:
    """Raise DataError if a folder holds records of other images."""
    started = read_json(manifest.settings_path(folder))
    finished = manifest.read_manifest(folder).get("settings")
    begun = any(os.path.exists(os.path.join(folder, name)) for name in SPLITS.values())
    if begun and settings not in (started, finished):
        raise DataError(
            f"--out: {folder} holds other records, or was begun with another --images-per-shard; "
            "remove it or name another folder"
        )
