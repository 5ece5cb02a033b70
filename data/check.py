"""Look at every image before an eight-hour job does.

    python -m data.check --train-dir T --val-dir V --report report.json --list bad.txt
    python -m data.check --data-dir DIR ...

decodes every file as training would, and says which are empty, truncated or otherwise unreadable,
which are odd though readable (CMYK, other formats under a JPEG's name, corrupt EXIF), whether train
and val hold the same classes, and how the counts compare with ImageNet's. Of records it verifies
checksums, index files and labels too. ``bad.txt`` names what cannot be read; the training scripts'
``--exclude`` takes it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from data import DataError, parallel, tfrecord
from data.atomic import read_json, replacing, write_json
from data.parallel import Pool
from data.records import INDEX_FOLDER, SPLITS, class_count, image_and_label, shard_files
from data.transforms import decode, image_kind
from data.tree import FileTree, scan

IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000, "validation": 50_000}

# Of a file that training cannot read: these go into the list.
FATAL = ("empty", "unreadable", "wrong label")

_CHUNK = 500


@dataclass(frozen=True)
class Files:
    """Some files of a tree."""

    split: str
    start: int
    root: str
    names: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Records:
    """One record file."""

    split: str
    start: int
    path: str
    index: str
    num_classes: int


@dataclass
class Finding:
    """What was found in some files, or in one record file."""

    split: str
    images: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    problems: list[tuple[str, str, str]] = field(default_factory=list)  # name, problem, detail

    def look(self, name: str, encoded: bytes) -> None:
        """Look at one image."""
        if not encoded:
            self.problems.append((name, "empty", "no bytes"))
            return
        try:
            decode(encoded)
        except DataError as error:
            self.problems.append((name, "unreadable", str(error)))
            return
        kind = image_kind(encoded)
        if kind is not None:
            self.problems.append((name, kind, "readable, by the slower decoder or with a warning"))


def inspect(task: Files | Records) -> dict[str, Any]:
    """Look at the images of one task."""
    finding = Finding(task.split)
    if isinstance(task, Files):
        for name, label in zip(task.names, task.labels, strict=True):
            finding.images += 1
            finding.labels[label] += 1
            try:
                with open(os.path.join(task.root, name), "rb") as file:
                    finding.look(name, file.read())
            except OSError as error:
                finding.problems.append((name, "unreadable", str(error.strerror)))
    else:
        _inspect_records(task, finding)
    return {
        "split": finding.split,
        "images": finding.images,
        "labels": {str(label): count for label, count in sorted(finding.labels.items())},
        "problems": finding.problems,
    }


def _inspect_records(task: Records, finding: Finding) -> None:
    file = os.path.basename(task.path)
    try:
        tfrecord.read_index(task.index, os.path.getsize(task.path))
    except DataError as error:
        finding.problems.append((file, "index", str(error)))
    try:
        for number, (_, payload) in enumerate(tfrecord.read_records(task.path)):
            name = f"{file}#{number}"
            finding.images += 1
            try:
                encoded, label = image_and_label(payload, task.num_classes)
            except DataError as error:
                finding.problems.append((name, "wrong label", str(error)))
                continue
            finding.labels[label] += 1
            finding.look(name, encoded)
    except DataError as error:  # nothing after this can be trusted
        finding.problems.append((file, "damaged file", str(error)))


def tasks_of_trees(train_dir: str, val_dir: str) -> tuple[list[Files], list[str], dict[str, int]]:
    """Return the tasks, what is wrong with the trees as such, and the classes of each split."""
    trees = {"train": scan(train_dir, "--train-dir"), "val": scan(val_dir, "--val-dir")}
    general = []
    if trees["train"].classes != trees["val"].classes:
        odd = sorted(set(trees["train"].classes) ^ set(trees["val"].classes))
        general.append(f"train and val hold different classes, such as {odd[0]}")
    tasks = [task for split, tree in trees.items() for task in _chunks(split, tree)]
    return tasks, general, {split: tree.num_classes for split, tree in trees.items()}


def _chunks(split: str, tree: FileTree) -> Iterator[Files]:
    for start in range(0, len(tree), _CHUNK):
        numbers = range(start, min(start + _CHUNK, len(tree)))
        names, labels = tuple(map(tree.name, numbers)), tuple(map(tree.label, numbers))
        yield Files(split, start, tree.root, names, labels)


def tasks_of_records(folder: str) -> tuple[list[Records], list[str], dict[str, int]]:
    """Return what `tasks_of_trees` does, for records."""
    num_classes, general, tasks = class_count(folder), [], []
    for split in SPLITS:
        try:
            files = shard_files(folder, split)
        except DataError as error:
            general.append(str(error))
            names = sorted(os.listdir(os.path.join(folder, split)))
            files = [
                (os.path.join(folder, split, n), os.path.join(folder, INDEX_FOLDER, split, n))
                for n in names
            ]
        tasks += [Records(split, i, *pair, num_classes) for i, pair in enumerate(files)]
    return tasks, general, dict.fromkeys(SPLITS, num_classes)


def summary(
    findings: list[dict[str, Any]], general: list[str], classes: dict[str, int]
) -> dict[str, Any]:
    """Put the findings together."""
    splits: dict[str, Any] = {}
    for split, num_classes in classes.items():
        mine = [finding for finding in findings if finding["split"] == split]
        images = sum(finding["images"] for finding in mine)
        labels: Counter[str] = Counter()
        for finding in mine:
            labels.update(finding["labels"])
        per_class = [labels[str(label)] for label in range(num_classes)]
        problems = [problem for finding in mine for problem in finding["problems"]]
        splits[split] = {
            "images": images,
            "classes": num_classes,
            "images_per_class": per_class,
            "problems": sorted(map(tuple, problems)),
        }
        if num_classes == 1000 and images != IMAGENET_COUNTS[split]:
            general.append(f"{split}: {images:,} images; ImageNet has {IMAGENET_COUNTS[split]:,}")
        missing = sum(count == 0 for count in per_class)
        if missing:
            general.append(f"{split}: {missing} of {num_classes} classes have no image")
    return {"general": general, "splits": splits}


def table(report: dict[str, Any]) -> str:
    """Return the report as text."""
    lines = [f"{'split':12}{'images':>10}{'classes':>9}{'least':>8}{'most':>8}  problems"]
    for split, found in report["splits"].items():
        kinds = Counter(problem for _, problem, _ in found["problems"])
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
        per_class = found["images_per_class"] or [0]
        lines.append(
            f"{split:12}{found['images']:>10,}{found['classes']:>9,}{min(per_class):>8,}"
            f"{max(per_class):>8,}  {told}"
        )
    lines += report["general"]
    for split, found in report["splits"].items():
        shown = [p for p in found["problems"] if p[1] in FATAL or p[1] in ("index", "damaged file")]
        lines += [f"{split}/{name}: {problem}: {detail}" for name, problem, detail in shown[:20]]
        if len(shown) > 20:
            lines.append(f"{split}: and {len(shown) - 20} more; see the report")
    return "\n".join(lines)


def bad_names(report: dict[str, Any]) -> list[str]:
    """Return the names of what training cannot read, as ``--exclude`` takes them."""
    return [
        f"{split}/{name}"
        for split, found in report["splits"].items()
        for name, problem, _ in found["problems"]
        if problem in FATAL
    ]


def check(options: argparse.Namespace, pool: Pool) -> bool:
    """Check, report, and say whether all is well (odd but readable images are)."""
    tasks: Sequence[Files | Records]
    if options.data_dir:
        tasks, general, classes = tasks_of_records(options.data_dir)
    else:
        tasks, general, classes = tasks_of_trees(options.train_dir, options.val_dir)
    notes = options.report + ".unfinished" if options.report else None
    findings = _all_findings(tasks, pool, notes)
    report = summary(findings, general, classes)
    print(table(report))
    bad = bad_names(report)
    if options.report:
        write_json(options.report, report)
    if options.list:
        with replacing(options.list) as file:
            file.write("".join(f"{name}\n" for name in bad).encode(errors="surrogateescape"))
    if notes:
        shutil.rmtree(notes, ignore_errors=True)
    damaged = any(
        problem in ("index", "damaged file")
        for found in report["splits"].values()
        for _, problem, _ in found["problems"]
    )
    return not (bad or damaged or report["general"])


def _all_findings(
    tasks: Sequence[Files | Records], pool: Pool, notes: str | None
) -> list[dict[str, Any]]:
    """Inspect; with `notes`, a folder, what an interrupted run has done is not done again."""
    findings, left = [], []
    for task in tasks:
        earlier = read_json(_note(notes, task)) if notes else None
        if earlier is None:
            left.append((task, _note(notes, task) if notes else None))
        else:
            findings.append(earlier)
    if notes:
        os.makedirs(notes, exist_ok=True)
    return findings + list(pool.work(_inspect_and_note, left, "files"))


def _inspect_and_note(job: tuple[Files | Records, str | None]) -> dict[str, Any]:
    task, note = job
    finding = inspect(task)
    if note:
        write_json(note, finding)
    return finding


def _note(notes: str, task: Files | Records) -> str:
    """Return the name of a task's note: a hash of what is to be looked at, with size and time."""
    paths = (
        [os.path.join(task.root, name) for name in task.names]
        if isinstance(task, Files)
        else [task.path, task.index]
    )
    sha = hashlib.sha256(repr(task).encode(errors="surrogateescape"))
    for path in paths:
        try:
            status = os.stat(path)
            sha.update(repr((status.st_size, status.st_mtime_ns)).encode())
        except OSError:
            sha.update(b"missing")
    return os.path.join(notes, sha.hexdigest()[:32] + ".json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; exit code 0: all can be read, 1: something is wrong, 2: wrong flags."""
    parser = argparse.ArgumentParser(
        prog="python -m data.check",
        description="Decode every image, verify every record, and report what is wrong.",
        epilog="Exit code: 0 all can be read, 1 something is wrong, 2 wrong flags.",
    )
    add = parser.add_argument
    add("--train-dir", help="folder of training images, one folder per class")
    add("--val-dir", help="folder of validation images, one folder per class")
    add("--data-dir", help="folder of TFRecords, instead of the two")
    add("--report", help="write all findings here, as JSON; an interrupted run goes on from it")
    add("--list", help="write the names of what cannot be read here, for --exclude")
    add("--workers", type=int, help="processes (default: one for each CPU allotted)")
    options = parser.parse_args(argv)
    folders = bool(options.train_dir) and bool(options.val_dir)
    if folders == bool(options.data_dir) or bool(options.train_dir) != bool(options.val_dir):
        parser.error("give --train-dir and --val-dir, or --data-dir")
    well = True
    try:
        with parallel.pool(options.workers) as pool:
            if pool is not None:
                well = check(options, pool)
    except (DataError, OSError) as error:
        print(f"data.check: {error}", file=sys.stderr)
        return 1
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
