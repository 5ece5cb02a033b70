"""The work of a checking process: look at some image files, or at one record file."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from data import DataError, SetError, layouts
from data.layouts import Options
from data.pixels.decode import decode, image_kind
from data.samples import tfrecord
from data.samples.record_files import MANIFEST
from data.samples.records import label_from_zero, parse_example
from data.samples.tree import why_unreadable


@dataclass(frozen=True)
class Files:
    """Task: some files of a tree."""

    split: str
    start: int
    names: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Numbers:
    """Task: some samples of a layout whose images are not files of their own."""

    split: str
    start: int
    stop: int
    path: str  # as given with --data
    options: Options
    fingerprint: str

    @property
    def paths(self) -> list[str]:
        """What to ask for size and time."""
        return [self.path]


@dataclass(frozen=True)
class Records:
    """Task: one record file."""

    split: str
    start: int
    path: str
    index: str
    num_classes: int
    label_base: int | None  # label of the first class; None: by the names of the features
    sha256: str | None  # from the manifest, if it has one for this file

    @property
    def paths(self) -> list[str]:
        """Paths of the record file and its index file."""
        return [self.path, self.index]


@dataclass
class Finding:
    """What was found in some files, or in one record file."""

    split: str
    images: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    names: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))  # of labels
    sha256: str | None = None
    problems: list[tuple[str, str, str]] = field(default_factory=list)  # name, problem, detail

    def add_problem(self, name: str, problem: str, detail: str) -> None:
        """Record a problem."""
        self.problems.append((name, problem, detail))

    def look(self, name: str, encoded: bytes) -> None:
        """Decode one image and record its problems."""
        if not encoded:
            self.add_problem(name, "empty", "no bytes")
            return
        try:
            decode(encoded)
        except DataError as error:
            self.add_problem(name, "unreadable", str(error))
            return
        kind = image_kind(encoded)
        if kind is not None:
            self.add_problem(name, kind, "readable, by the slower decoder or with a warning")


Task = Files | Numbers | Records


def inspect(task: Task) -> dict[str, Any]:
    """Look at the images of one task."""
    finding = Finding(task.split)
    if isinstance(task, Files):
        _inspect_files(task, finding)
    elif isinstance(task, Numbers):
        _inspect_numbers(task, finding)
    else:
        _inspect_records(task, finding)
    return {
        "split": finding.split,
        "images": finding.images,
        "labels": {str(label): count for label, count in sorted(finding.labels.items())},
        "names": {str(label): sorted(names) for label, names in sorted(finding.names.items())},
        "file": os.path.basename(task.path) if isinstance(task, Records) else None,
        "sha256": finding.sha256,
        "problems": finding.problems,
    }


def _inspect_files(task: Files, finding: Finding) -> None:
    for path, name, label in zip(task.paths, task.names, task.labels, strict=True):
        finding.images += 1
        finding.labels[label] += 1
        try:
            with open(path, "rb") as file:
                finding.look(name, file.read())
        except OSError as error:
            finding.add_problem(name, "unreadable", why_unreadable(path, error))


def _inspect_numbers(task: Numbers, finding: Finding) -> None:
    samples = layouts.opened(task.path, task.split, task.options)
    for number in range(task.start, task.stop):
        finding.images += 1
        name = samples.name(number)
        try:
            encoded, label = samples.encoded(number)
        except SetError as error:
            finding.add_problem(name, "damaged file", str(error))
        except DataError as error:
            finding.add_problem(name, "unreadable", str(error))
        else:
            finding.labels[label] += 1
            finding.look(name, encoded)


def _inspect_records(task: Records, finding: Finding) -> None:
    file = os.path.basename(task.path)
    index = None
    try:
        index = tfrecord.read_index(task.index, os.path.getsize(task.path)).tolist()
    except DataError as error:
        finding.add_problem(file, "index", str(error))
    except OSError as error:
        finding.add_problem(file, "damaged file", why_unreadable(task.path, error))
        return
    try:
        rows = _inspect_each_record(task, finding)
        with open(task.path, "rb") as record_file:
            finding.sha256 = hashlib.file_digest(record_file, "sha256").hexdigest()
    except DataError as error:  # nothing after this record can be trusted
        finding.add_problem(file, "damaged file", str(error))
        return
    except OSError as error:
        finding.add_problem(file, "damaged file", why_unreadable(task.path, error))
        return
    if index not in (None, rows):
        detail = (
            f"{task.index} does not give the positions of the records; make it again with "
            "python -m data.make_tfrecords --from-tfrecords"
        )
        finding.add_problem(file, "index", detail)
    if task.sha256 not in (None, finding.sha256):
        detail = f"its SHA-256 is not the one in {MANIFEST}; copy the file again"
        finding.add_problem(file, "changed file", detail)


def _inspect_each_record(task: Records, finding: Finding) -> list[list[int]]:
    """Look at the records of a file; return the rows that its index file should have."""
    rows = []
    file = os.path.basename(task.path)
    for number, (offset, payload) in enumerate(tfrecord.read_records(task.path)):
        name = f"{file}#{number}"
        rows.append([offset, len(payload) + tfrecord.OVERHEAD])
        finding.images += 1
        try:
            example = parse_example(payload)
        except DataError as error:
            finding.add_problem(name, "wrong features", str(error))
            continue
        try:
            label = label_from_zero(example, task.num_classes, task.label_base)
        except SetError as error:
            finding.add_problem(name, "wrong label", str(error))
            continue
        finding.labels[label] += 1
        if example.class_name is not None:
            finding.names[label].add(example.class_name)
        finding.look(name, example.image)
    if not rows:
        finding.add_problem(file, "empty file", "it holds no records; copy or make it again")
    return rows
