"""What there is to check: the files of two trees or of a set of records, divided into tasks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from data import DataError
from data.check.inspection import Files, Records
from data.samples.record_files import (
    INDEX_FOLDER,
    MANIFEST,
    SPLITS,
    class_count,
    damaged_manifest,
    missing_shards,
    shard_files,
    visible_names,
)
from data.samples.tree import FileTree, first_few, scan_with_empty_classes, why_unreadable

# Images of one task.
_CHUNK = 500


def tasks_of_trees(
    train_dir: str, val_dir: str
) -> tuple[list[Files], list[str], dict[str, list[str]]]:
    """Return the tasks, the problems of the trees as such, and the classes of each split."""
    trees = {
        "train": scan_with_empty_classes(train_dir, "--train-dir"),
        "val": scan_with_empty_classes(val_dir, "--val-dir"),
    }
    train, val = set(trees["train"].classes), set(trees["val"].classes)
    general = [
        f"{split}: {entry.name} {why_unreadable(entry.path, FileNotFoundError())}"
        for split, tree in trees.items()
        for entry in sorted(os.scandir(tree.root), key=lambda entry: entry.name)
        if entry.is_symlink() and not os.path.exists(entry.path)
    ]
    if train != val:
        general.append(
            "train and val hold different classes, so their labels do not agree; only in train: "
            f"{first_few(sorted(train - val))}; only in val: {first_few(sorted(val - train))}"
        )
    tasks = [task for split, tree in trees.items() for task in _chunks(split, tree)]
    return tasks, general, {split: tree.classes for split, tree in trees.items()}


def _chunks(split: str, tree: FileTree) -> Iterator[Files]:
    for start in range(0, len(tree), _CHUNK):
        numbers = range(start, min(start + _CHUNK, len(tree)))
        names, labels = tuple(map(tree.name, numbers)), tuple(map(tree.label, numbers))
        yield Files(split, start, tree.root, names, labels)


def tasks_of_records(
    folder: str, manifest: dict[str, Any] | None
) -> tuple[list[Records], list[str], dict[str, list[str]]]:
    """Return the same as `tasks_of_trees`, for records."""
    if not os.path.isdir(folder):
        raise DataError(f"--data-dir: {folder} is not a folder")
    num_classes, general, tasks = class_count(folder), [], []
    for split in SPLITS:
        try:
            files = shard_files(folder, split)
        except DataError as error:
            general.append(str(error))
            files = _unpaired_files(folder, split)
        hashes = _manifest_hashes(folder, manifest, split)
        general += _wrong_files(split, {os.path.basename(path) for path, _ in files}, hashes)
        tasks += [
            Records(split, i, *pair, num_classes, hashes.get(os.path.basename(pair[0])))
            for i, pair in enumerate(files)
        ]
    names = manifest and manifest.get("classes")
    if not isinstance(names, list) or len(names) != num_classes:
        names = [f"label {label}" for label in range(1, num_classes + 1)]
    return tasks, general, dict.fromkeys(SPLITS, names)


def _unpaired_files(folder: str, split: str) -> list[tuple[str, str]]:
    """Return the pairs of `shard_files`, even if some index files are missing or superfluous."""
    records, indices = os.path.join(folder, split), os.path.join(folder, INDEX_FOLDER, split)
    try:
        names = visible_names(records)
    except OSError:
        return []
    paths = [os.path.join(indices, name) for name in names]
    return [
        (os.path.join(records, name), path if os.path.exists(path) else f"{path}.idx")
        for name, path in zip(names, paths, strict=True)
    ]


def _manifest_hashes(folder: str, manifest: dict[str, Any] | None, split: str) -> dict[str, str]:
    """Return the manifest's SHA-256 of each file of a split; {} without a manifest."""
    if manifest is None:
        return {}
    try:
        return {shard["name"]: shard["sha256"] for shard in manifest["splits"][split]["shards"]}
    except (KeyError, TypeError) as error:
        raise damaged_manifest(folder) from error


def _wrong_files(split: str, names: set[str], hashes: dict[str, str]) -> list[str]:
    """Return which record files are missing or unexpected, by the manifest or by their names."""
    missing = sorted(set(hashes) - names) if hashes else missing_shards(names)
    unexpected = sorted(names - set(hashes)) if hashes else []
    problems = []
    if missing:
        problems.append(
            f"{split}: {first_few(missing)} missing, according to "
            + (MANIFEST if hashes else "the files' names")
            + "; copy or make the missing files again"
        )
    if unexpected:
        problems.append(
            f"{split}: {first_few(unexpected)} not in {MANIFEST}; remove it, or write the manifest "
            "again with python -m data.make_tfrecords --from-tfrecords"
        )
    return problems
