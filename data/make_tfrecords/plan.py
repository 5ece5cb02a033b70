"""Which shards to write from the folders, and which record files to index."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from data import DataError, FlagError, layouts
from data.loader.order import even_bounds, permutation
from data.make_tfrecords.shards import Conversion, Shard
from data.samples.exclude import read_excluded
from data.samples.record_files import (
    INDEX_FOLDER,
    SPLITS,
    refuse_common_folder,
    refuse_flat_records,
    visible_names,
)
from data.samples.shard_names import missing_shards
from data.samples.tree import FileTree, scan, why_unreadable
from data.tooling.atomic import is_unfinished

# Asking a network file system for sizes is mostly waiting, which threads overlap.
_THREADS = 16


def open_images(options: argparse.Namespace) -> dict[str, FileTree]:
    """Open the images of both splits: ``train`` and ``validation``.

    Raises:
        DataError: They cannot be used, or have different classes.
    """
    if options.data:
        found = layouts.find(options.data)
        if found.layout not in layouts.OF_FILES:
            raise FlagError(
                f"--data {options.data}: {found.title}; this tool reads image files only. "
                f"Give python -m data.prepare --data {options.data} --out {options.data_dir}"
            )
        opened = layouts.open_both(found, layouts.Options(options.exclude))
        trees = cast("tuple[FileTree, FileTree]", opened)
        for tree in trees:
            refuse_common_folder(options.data_dir, "--data", tree.root)
        return dict(zip(SPLITS, trees, strict=True))
    train, val = _scan(options, "train"), _scan(options, "val")
    if train.classes != val.classes:
        raise DataError("--train-dir and --val-dir must hold the same class folders")
    return {"train": train, "validation": val}


def _scan(options: argparse.Namespace, split: str) -> FileTree:
    flag = f"--{split}-dir"
    tree = scan(getattr(options, f"{split}_dir"), flag, read_excluded(options.exclude, split))
    if tree.oddities.implausible:
        raise DataError(f"{flag}: {tree.oddities.implausible}")
    return tree


def plan_split(split: str, tree: FileTree, options: argparse.Namespace) -> tuple[list[Shard], str]:
    """Return the shards of one split, and the `images_hash` of its images.

    Training images are shuffled.
    """
    for note in tree.oddities.notes:
        print(f"note: {note}")
    excluded = read_excluded(options.exclude, "train" if split == "train" else "val")
    if excluded:
        found = len(excluded) - len(tree.unmatched)
        print(f"{split}: {found} images left out, of {len(excluded)} that --exclude lists")
    order = range(len(tree))
    if split == "train":
        order = permutation(len(tree), options.seed, epoch=0).tolist()
    bounds = even_bounds(len(tree), options.images_per_shard)
    conversion = Conversion(options.reencode, options.short_side, options.quality)
    shards = []
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        images = tuple((tree.path(i), tree.name(i), tree.label(i) + 1) for i in order[start:stop])
        name = f"{split}-{number:05d}-of-{len(bounds) - 1:05d}"
        shards.append(Shard(options.data_dir, split, name, images, conversion))
    return shards, images_hash(tree)


def images_hash(tree: FileTree) -> str:
    """Return a hash of the names and sizes of all images."""

    def of_class(start: int, stop: int) -> str:
        sha = hashlib.sha256()
        for index in range(start, stop):
            path = tree.path(index)
            try:
                size = os.path.getsize(path)
            except OSError as error:
                raise DataError(f"{path} {why_unreadable(path, error)}") from error
            sha.update(repr((tree.name(index), size)).encode(errors="surrogateescape"))
        return sha.hexdigest()

    stops = list(itertools.accumulate(tree.counts))
    with ThreadPoolExecutor(_THREADS) as threads:
        classes = threads.map(of_class, [0, *stops], stops)
        return hashlib.sha256("".join(classes).encode()).hexdigest()


def existing_shards(folder: str) -> list[Shard]:
    """Return the record files under `folder`, without hidden files."""
    refuse_flat_records(folder)
    shards = []
    for split in SPLITS:
        try:
            names = visible_names(os.path.join(folder, split))
        except OSError as error:
            raise DataError(f"--data-dir: {folder}/{split}: {error.strerror}") from error
        if not names:
            raise DataError(f"--data-dir: {folder}/{split} holds no record files")
        for name in filter(is_unfinished, names):
            raise DataError(
                f"--data-dir: {folder}/{split}/{name} was left by a run that was killed; run that "
                "command again, or remove the file"
            )
        missing = missing_shards(names)
        if missing:
            raise DataError(
                f"--data-dir: {folder}/{split} lacks {len(missing)} files according to the names "
                f"of the others, for example {missing[0]}; make or copy them first (or rename the "
                "others, if you want only a part)"
            )
        shards += [Shard(folder, split, name) for name in names]
        _refuse_odd_indices(os.path.join(folder, INDEX_FOLDER, split), names)
    return shards


def _refuse_odd_indices(folder: str, names: list[str]) -> None:
    """Raise DataError for an index file that would stay next to the new ones without a record file."""
    if not os.path.isdir(folder):
        return
    expected = {f"{name}.idx" for name in names}
    for name in visible_names(folder):
        if not is_unfinished(name) and name not in expected:
            raise DataError(
                f"--data-dir: {os.path.join(folder, name)} is not the index file of a record file "
                "(those end in .idx); remove it: this command writes all index files"
            )
