"""The course of a conversion: plan shards, make the missing ones, write the manifest."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from typing import Any

from data import DataError
from data.make_tfrecords import manifest
from data.make_tfrecords.plan import existing_shards, open_images, plan_split
from data.make_tfrecords.shards import NOTES, Shard, index_shard, write_shard
from data.samples.tree import FileTree
from data.tooling.atomic import locked, read_json
from data.tooling.pool import Pool

# Flags that determine the bytes, together with the images.
SETTINGS = ("seed", "images_per_shard", "reencode", "short_side", "quality")


def make(options: argparse.Namespace, pool: Pool) -> None:
    """Write records of both splits, or index existing ones."""
    if options.from_tfrecords and not os.path.isdir(options.data_dir):
        raise DataError(f"--data-dir: {options.data_dir} is not a folder")
    trees = None if options.from_tfrecords else open_images(options)
    with locked(options.data_dir):
        if trees is None:
            _index_existing(options, pool)
        else:
            _write(trees, options, pool)


def _index_existing(options: argparse.Namespace, pool: Pool) -> None:
    shards = existing_shards(options.data_dir)
    settings: dict[str, Any] = {"from_tfrecords": True}
    if read_json(manifest.settings_path(options.data_dir)) != settings:
        # Notes on shards that were written from folders hold no class names.
        shutil.rmtree(os.path.join(options.data_dir, NOTES), ignore_errors=True)
    _complete(options.data_dir, shards, None, settings, index_shard, pool, options.label_base)


def _write(trees: dict[str, FileTree], options: argparse.Namespace, pool: Pool) -> None:
    classes = trees["train"].classes
    shards, train_images = plan_split("train", trees["train"], options)
    val_shards, val_images = plan_split("validation", trees["validation"], options)
    shards += val_shards
    settings: dict[str, Any] = {name: getattr(options, name) for name in SETTINGS}
    settings |= {"train_dir": train_images, "val_dir": val_images}
    manifest.refuse_other_settings(options.data_dir, settings)
    if manifest.is_complete(options.data_dir, shards, settings):
        print(f"{options.data_dir}: the records are already there")
        return
    _complete(options.data_dir, shards, classes, settings, write_shard, pool)


def _complete(
    folder: str,
    shards: list[Shard],
    classes: list[str] | None,
    settings: dict[str, Any],
    make_shard: Callable[[Shard], dict[str, Any]],
    pool: Pool,
    label_base: int | None = None,
) -> None:
    """Make the shards that are not finished, and write the manifest."""
    manifest.start(folder, settings)
    unfinished = [shard for shard in shards if not manifest.is_finished(shard)]
    if len(unfinished) < len(shards):
        print(f"{folder}: continuing with {len(unfinished)} of {len(shards)} files")
    for _ in pool.work(make_shard, unfinished, "shards"):
        pass
    manifest.write_manifest(folder, shards, classes, settings, label_base)
