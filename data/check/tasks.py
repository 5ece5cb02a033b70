"""What there is to check: the files of two trees or of a set of records, divided into tasks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data import DataError, FlagError, layouts
from data.check.inspection import Files, Numbers, Records, Task
from data.layouts import Options
from data.samples import LabelledSamples, NumberedSamples
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

    tasks: Sequence[Task]
    general: list[str]
    classes: dict[str, list[str]]
    notes: list[str]


def plan_trees(train_dir: str, val_dir: str) -> Plan:
    """Return what there is to check in two folders of class folders."""
    trees = {
        "train": scan_with_gaps(train_dir, "--train-dir"),
        "val": scan_with_gaps(val_dir, "--val-dir"),
    }
    notes = [note for tree in trees.values() for note in tree.oddities.notes]
    if same_images(trees["train"], trees["val"]):
        notes.append("train and val hold the same images")
    tasks = [task for split, tree in trees.items() for task in _chunks(split, tree)]
    return _plan(trees, tasks, notes)


def plan_layout(path: str, label_base: int | None, index_dir: str | None) -> Plan:
    """Return what there is to check in the layout of ``--data``."""
    found = layouts.find(path)
    if found.layout == "records":
        return plan_records(path, label_base)
    if label_base is not None and "label_base" not in found.takes:
        raise FlagError(f"--label-base has no effect on {found.title}; leave it out")
    options = Options(label_base=label_base, index_dir=index_dir, gaps=True)
    opened: dict[str, NumberedSamples] = {}
    tasks: list[Task] = []
    for split in layouts.SPLITS:
        if getattr(found, split) is None:
            continue
        if "train" in opened:
            options = layouts.options_for_val(options, opened["train"])
        samples = opened[split] = layouts.open_split(found, split, options)
        if isinstance(samples, FileTree):
            tasks += _chunks(split, samples)
        else:
            tasks += _numbers(split, samples, path, options)
    notes = [found.line(opened.get("train"), opened.get("val"))]
    if len(opened) == len(layouts.SPLITS):
        notes += layouts.layout(found.layout).warnings(found, opened["train"], opened["val"])
    return _plan(opened, tasks, notes)


def _plan(
    opened: Mapping[str, LabelledSamples], tasks: Sequence[Task], notes: Sequence[str]
) -> Plan:
    """Return the plan for samples whose splits should have the same classes."""
    trees = {split: tree for split, tree in opened.items() if isinstance(tree, FileTree)}
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
    classes = {split: list(samples.class_names) for split, samples in opened.items()}
    train, val = (set(classes.get(split, [])) for split in layouts.SPLITS)
    if train and val and train != val:  # large files may not name their classes
        general.append(
            "train and val hold different classes, so their labels do not agree; only in train: "
            f"{first_few(sorted(train - val))}; only in val: {first_few(sorted(val - train))}"
        )
    for split, samples in opened.items():
        classes[split] = classes[split] or [f"label {i}" for i in range(samples.num_classes)]
    return Plan(tasks, general, classes, [f"note: {note}" for note in notes])


def _numbers(
    split: str, samples: LabelledSamples, path: str, options: Options
) -> Iterator[Numbers]:
    for start in range(0, len(samples), _CHUNK):
        stop = min(start + _CHUNK, len(samples))
        yield Numbers(split, start, stop, path, options, samples.fingerprint)


def _chunks(split: str, tree: FileTree) -> Iterator[Files]:
    for start in range(0, len(tree), _CHUNK):
        numbers = range(start, min(start + _CHUNK, len(tree)))
        names, paths = tuple(map(tree.name, numbers)), tuple(map(tree.path, numbers))
        yield Files(split, start, names, paths, tuple(map(tree.label, numbers)))


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
