"""What there is to check: the files of two trees or of a set of records, divided into tasks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data import DataError
from data.check.inspection import Files, Records
from data.samples.listing import first_few
from data.samples.record_files import (
    INDEX_FOLDER,
    SPLITS,
    Manifest,
    refuse_flat_records,
    same_records,
    shard_files,
    visible_names,
    wrong_files,
)
from data.samples.tree import FileTree, same_images, scan_with_gaps, why_unreadable

# Images of one task.
_CHUNK = 500


@dataclass(frozen=True)
class Plan:
    """What there is to check.

    Attributes:
        tasks: The work.
        general: Problems of the set as such.
        classes: Names of the classes of each split.
        notes: Observations that are not problems.
    """

    tasks: Sequence[Files | Records]
    general: list[str]
    classes: dict[str, list[str]]
    notes: list[str]


def plan_trees(train_dir: str, val_dir: str) -> Plan:
    """Return what there is to check in two folders of class folders."""
    trees = {
        "train": scan_with_gaps(train_dir, "--train-dir"),
        "val": scan_with_gaps(val_dir, "--val-dir"),
    }
    train, val = set(trees["train"].classes), set(trees["val"].classes)
    general = [
        f"{split}: {link} {why_unreadable(os.path.join(tree.root, link), FileNotFoundError())}"
        for split, tree in trees.items()
        for link in tree.oddities.broken_links
    ]
    general += [
        f"{split}: {tree.oddities.implausible}"
        for split, tree in trees.items()
        if tree.oddities.implausible
    ]
    notes = [f"note: {note}" for tree in trees.values() for note in tree.oddities.notes]
    if same_images(trees["train"], trees["val"]):
        notes.append("note: train and val hold the same images")
    if train != val:
        general.append(
            "train and val hold different classes, so their labels do not agree; only in train: "
            f"{first_few(sorted(train - val))}; only in val: {first_few(sorted(val - train))}"
        )
    tasks = [task for split, tree in trees.items() for task in _chunks(split, tree)]
    return Plan(tasks, general, {split: tree.classes for split, tree in trees.items()}, notes)


def _chunks(split: str, tree: FileTree) -> Iterator[Files]:
    for start in range(0, len(tree), _CHUNK):
        numbers = range(start, min(start + _CHUNK, len(tree)))
        names, labels = tuple(map(tree.name, numbers)), tuple(map(tree.label, numbers))
        yield Files(split, start, tree.root, names, labels)


def plan_records(folder: str, label_base: int | None) -> Plan:
    """Return what there is to check in a folder of records."""
    if not os.path.isdir(folder):
        raise DataError(f"--data-dir: {folder} is not a folder")
    refuse_flat_records(folder)
    manifest = Manifest(folder)
    base = manifest.label_base(label_base)
    general, tasks = [], []
    for split in SPLITS:
        try:
            files = shard_files(folder, split)
        except DataError as error:
            general.append(str(error))
            files = _unpaired_files(folder, split)
        entries = manifest.entries(split)
        general += wrong_files(split, {os.path.basename(path) for path, _ in files}, set(entries))
        tasks += [
            Records(split, i, *pair, manifest.num_classes, base, _sha256(entries, pair[0]))
            for i, pair in enumerate(files)
        ]
    first = 1 if base is None else base
    names = manifest.class_names or [f"label {first + i}" for i in range(manifest.num_classes)]
    same = not general and same_records(folder)
    notes = ["note: train and validation hold the same images"] if same else []
    return Plan(tasks, general, dict.fromkeys(SPLITS, names), notes)


def _sha256(entries: dict[str, dict[str, Any]], path: str) -> str | None:
    return entries.get(os.path.basename(path), {}).get("sha256")


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
