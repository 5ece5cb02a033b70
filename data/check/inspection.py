"""Look at every image before an eight-hour job does.

    python -m data.check --train-dir T --val-dir V --report report.json --list bad.txt
    python -m data.check --data-dir DIR ...

decodes every file as training would, and says which are empty, truncated or otherwise unreadable,
which are odd though readable (CMYK, other formats under a JPEG's name, corrupt EXIF), whether train
and val hold the same classes, and how the counts compare with ImageNet's. Of records it verifies
checksums, index files, labels and the order of classes too, and that the files are those of the
manifest: none missing, changed, doubled or too much. ``bad.txt`` names what cannot be read; the
training scripts' ``--exclude`` takes it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from data import DataError, tfrecord, tool
from data.atomic import alone, read_json, replacing, write_json
from data.parallel import Pool
from data.records import (
    INDEX_FOLDER,
    MANIFEST,
    SPLITS,
    class_count,
    image_and_label,
    shard_files,
)
from data.transforms import decode, image_kind
from data.tree import FileTree, listed, some, why_unreadable

IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000, "validation": 50_000}

# Of a file that training cannot read: these go into the list.
FATAL = ("empty", "unreadable", "wrong label")

# Of a whole record file.
_OF_FILES = ("index", "damaged file", "changed file")

_WNID = re.compile(r"n\d{8}")

_LINE_BREAK = re.compile(r"[\r\n]")

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
    sha256: str | None  # what the manifest says, if it says it


@dataclass
class Finding:
    """What was found in some files, or in one record file."""

    split: str
    images: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    names: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))  # of labels
    sha256: str | None = None
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
            path = os.path.join(task.root, name)
            try:
                with open(path, "rb") as file:
                    finding.look(name, file.read())
            except OSError as error:
                finding.problems.append((name, "unreadable", why_unreadable(path, error)))
    else:
        _inspect_records(task, finding)
    return {
        "split": finding.split,
        "images": finding.images,
        "labels": {str(label): count for label, count in sorted(finding.labels.items())},
        "names": {str(label): sorted(names) for label, names in sorted(finding.names.items())},
        "file": None if isinstance(task, Files) else os.path.basename(task.path),
        "sha256": finding.sha256,
        "problems": finding.problems,
    }


def _inspect_records(task: Records, finding: Finding) -> None:
    file = os.path.basename(task.path)
    index, places = None, []
    try:
        index = tfrecord.read_index(task.index, os.path.getsize(task.path)).tolist()
    except DataError as error:
        finding.problems.append((file, "index", str(error)))
    except OSError as error:
        finding.problems.append((file, "damaged file", why_unreadable(task.path, error)))
        return
    try:
        for number, (offset, payload) in enumerate(tfrecord.read_records(task.path)):
            name = f"{file}#{number}"
            places.append([offset, len(payload) + tfrecord.OVERHEAD])
            finding.images += 1
            try:
                encoded, label = image_and_label(payload, task.num_classes)
            except DataError as error:
                finding.problems.append((name, "wrong label", str(error)))
                continue
            finding.labels[label] += 1
            for class_name in tfrecord.decode_example(payload).get(tfrecord.CLASS_NAME, []):
                if isinstance(class_name, bytes):
                    finding.names[label].add(os.fsdecode(class_name))
            finding.look(name, encoded)
        with open(task.path, "rb") as whole:
            finding.sha256 = hashlib.file_digest(whole, "sha256").hexdigest()
    except DataError as error:  # nothing after this can be trusted
        finding.problems.append((file, "damaged file", str(error)))
        return
    except OSError as error:
        finding.problems.append((file, "damaged file", why_unreadable(task.path, error)))
        return
    if index not in (None, places):
        detail = (
            f"{task.index} does not tell where the records are; make it again with: "
            "python -m data.make_tfrecords --from-tfrecords"
        )
        finding.problems.append((file, "index", detail))
    if finding.sha256 != (task.sha256 or finding.sha256):
        detail = f"not the bytes that {MANIFEST} tells; copy the file again"
        finding.problems.append((file, "changed file", detail))


def tasks_of_trees(
    train_dir: str, val_dir: str
) -> tuple[list[Files], list[str], dict[str, list[str]]]:
    """Return the tasks, what is wrong with the trees as such, and the classes of each split."""
    trees = {"train": listed(train_dir, "--train-dir"), "val": listed(val_dir, "--val-dir")}
    train, val = set(trees["train"].classes), set(trees["val"].classes)
    general = [
        f"{split}: {entry.name} {why_unreadable(entry.path, FileNotFoundError())}"
        for split, tree in trees.items()
        for entry in sorted(os.scandir(tree.root), key=lambda entry: entry.name)
        if entry.is_symlink() and not os.path.exists(entry.path)
    ]
    if train != val:
        general.append(
            f"train and val hold different classes, so labels do not agree; only in train: "
            f"{some(sorted(train - val))}; only in val: {some(sorted(val - train))}"
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
    """Return what `tasks_of_trees` does, for records."""
    if not os.path.isdir(folder):
        raise DataError(f"--data-dir: {folder} is not a folder")
    num_classes, general, tasks = class_count(folder), [], []
    for split in SPLITS:
        try:
            files = shard_files(folder, split)
        except DataError as error:
            general.append(str(error))
            files = _unpaired(folder, split)
        told = _told(folder, manifest, split)
        general += _amiss(split, {os.path.basename(path) for path, _ in files}, told)
        tasks += [
            Records(split, i, *pair, num_classes, told.get(os.path.basename(pair[0])))
            for i, pair in enumerate(files)
        ]
    names = manifest and manifest.get("classes")
    if not isinstance(names, list) or len(names) != num_classes:
        names = [f"label {label}" for label in range(1, num_classes + 1)]
    return tasks, general, dict.fromkeys(SPLITS, names)


def _unpaired(folder: str, split: str) -> list[tuple[str, str]]:
    """Return what `shard_files` would, although some index files are missing or too much."""
    records, indices = os.path.join(folder, split), os.path.join(folder, INDEX_FOLDER, split)
    try:
        names = sorted(name for name in os.listdir(records) if not name.startswith("."))
    except OSError:
        return []
    paths = [os.path.join(indices, name) for name in names]
    return [
        (os.path.join(records, name), path if os.path.exists(path) else f"{path}.idx")
        for name, path in zip(names, paths, strict=True)
    ]


def _told(folder: str, manifest: dict[str, Any] | None, split: str) -> dict[str, str]:
    """Return the SHA-256 of each file of a split that the manifest tells; {} without one."""
    if manifest is None:
        return {}
    try:
        return {shard["name"]: shard["sha256"] for shard in manifest["splits"][split]["shards"]}
    except (KeyError, TypeError) as error:
        path = os.path.join(folder, MANIFEST)
        raise DataError(
            f"{path} is damaged: write it anew with "
            f"python -m data.make_tfrecords --from-tfrecords --data-dir {folder}"
        ) from error


def _amiss(split: str, names: set[str], told: dict[str, str]) -> list[str]:
    """Say which record files are missing or too much, by the manifest or by their names."""
    missing = sorted(set(told) - names) if told else tfrecord.missing_shards(names)
    surplus = sorted(names - set(told)) if told else []
    amiss = []
    if missing:
        amiss.append(
            f"{split}: {some(missing)} missing, by "
            + (MANIFEST if told else "the files' names")
            + "; copy or make again what is missing"
        )
    if surplus:
        amiss.append(
            f"{split}: {some(surplus)} not in {MANIFEST}; remove it, or make the manifest anew "
            "with python -m data.make_tfrecords --from-tfrecords"
        )
    return amiss


def doubled(findings: list[dict[str, Any]]) -> list[str]:
    """Say which record files hold the same bytes."""
    by_hash = defaultdict(list)
    for finding in findings:
        if finding["sha256"]:
            by_hash[finding["sha256"]].append(f"{finding['split']}/{finding['file']}")
    return [
        f"{' and '.join(sorted(files))} are the same file; remove all but one"
        for files in by_hash.values()
        if len(files) > 1
    ]


def disorder(findings: list[dict[str, Any]], manifest: dict[str, Any] | None) -> list[str]:
    """Say where the class names in the records disagree: with each other, with the manifest."""
    classes = manifest and manifest.get("classes")
    by_label: dict[int, set[str]] = defaultdict(set)
    for finding in findings:
        for label, names in finding["names"].items():
            by_label[int(label)].update(names)
    for label, names in sorted(by_label.items()):
        if len(names) > 1:
            return [f"label {label + 1} is of several classes: {some(sorted(names))}"]
        if classes and classes[label] not in names:
            (name,) = names
            return [
                f"label {label + 1} is {name} in the records, but {classes[label]} in {MANIFEST}"
            ]
    found = [name for _, (name,) in sorted(by_label.items())]
    if found != sorted(found) and all(map(_WNID.fullmatch, found)):
        first = next(a for a, b in zip(found, sorted(found), strict=True) if a != b)
        return [
            f"labels do not number the sorted class names, as those of folders do (from {first} on): "
            "such records and folders do not go together"
        ]
    return []


def summary(
    findings: list[dict[str, Any]], general: list[str], classes: dict[str, list[str]]
) -> dict[str, Any]:
    """Put the findings together."""
    splits: dict[str, Any] = {}
    for split, names in classes.items():
        num_classes = len(names)
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
        empty = [name for name, count in zip(names, per_class, strict=True) if not count]
        if empty:
            general.append(
                f"{split}: {len(empty)} of {num_classes} classes have no image: {some(empty)}"
            )
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
        shown = [p for p in found["problems"] if p[1] in FATAL or p[1] in _OF_FILES]
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
    if not options.report:
        return _check(options, pool, None)
    notes = options.report + ".unfinished"
    with alone(notes):
        well = _check(options, pool, notes)
        shutil.rmtree(notes, ignore_errors=True)
    return well


def _check(options: argparse.Namespace, pool: Pool, notes: str | None) -> bool:
    tasks: Sequence[Files | Records]
    manifest = None
    if options.data_dir:
        manifest = read_json(os.path.join(options.data_dir, MANIFEST))
        tasks, general, classes = tasks_of_records(options.data_dir, manifest)
    else:
        tasks, general, classes = tasks_of_trees(options.train_dir, options.val_dir)
    findings = _all_findings(tasks, pool, notes)
    if options.data_dir:
        general += doubled(findings) + disorder(findings, manifest)
    report = summary(findings, general, classes)
    bad = bad_names(report)
    broken = [repr(name) for name in bad if _LINE_BREAK.search(name)]
    if broken:
        report["general"].append(
            f"no list for --exclude can name what has a line break in its name; rename or remove "
            f"it: {some(broken)}"
        )
    print(table(report))
    if options.report:
        write_json(options.report, report)
    if options.list:
        with replacing(options.list) as file:
            lines = [name for name in bad if not _LINE_BREAK.search(name)] or ["# none"]
            file.write("".join(f"{name}\n" for name in lines).encode(errors="surrogateescape"))
    damaged = any(
        problem in _OF_FILES
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


def _same(path: str, other: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return the exit code, 3 if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m data.check",
        description="Decode every image, verify every record, and report what is wrong.",
        epilog=tool.EXIT_CODES,
    )
    add = parser.add_argument
    add("--train-dir", help="folder of training images, one folder per class")
    add("--val-dir", help="folder of validation images, one folder per class")
    add("--data-dir", help="folder of TFRecords, instead of the two")
    add("--report", help="write all findings here, as JSON; an interrupted run goes on from it")
    add("--list", help="write the names of what cannot be read here, for --exclude")
    tool.add_workers(parser)
    options = parser.parse_args(argv)
    folders = bool(options.train_dir) and bool(options.val_dir)
    if folders == bool(options.data_dir) or bool(options.train_dir) != bool(options.val_dir):
        parser.error("give --train-dir and --val-dir, or --data-dir")
    tool.refuse_unwritable(parser, "--report", options.report)
    tool.refuse_unwritable(parser, "--list", options.list)
    if options.report and options.list and _same(options.report, options.list):
        parser.error("--report and --list name the same file")
    return tool.run("data.check", lambda pool: check(options, pool), options.workers)


if __name__ == "__main__":
    sys.exit(main())
