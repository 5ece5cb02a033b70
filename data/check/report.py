"""From findings to a report: a table, general problems, and the list for ``--exclude``."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from data.samples.listing import first_few
from data.samples.record_files import IMAGENET_COUNTS, MANIFEST

# Problems of an image that training cannot read. These images go into the list for --exclude.
FATAL = ("empty", "unreadable")

# Problems of the set or of an entire record file. Leaving out images would hide them.
SET_PROBLEMS = (
    "wrong features",
    "wrong label",
    "empty file",
    "index",
    "damaged file",
    "changed file",
)

_WNID = re.compile(r"n\d{8}")


def duplicated_files(findings: list[dict[str, Any]]) -> list[str]:
    """Return which record files hold the same bytes."""
    by_hash = defaultdict(list)
    for finding in findings:
        if finding["sha256"]:
            by_hash[finding["sha256"]].append(f"{finding['split']}/{finding['file']}")
    return [
        f"{' and '.join(sorted(files))} are the same file; remove all but one"
        for files in by_hash.values()
        if len(files) > 1
    ]


def class_name_conflicts(
    findings: list[dict[str, Any]], manifest: dict[str, Any] | None
) -> list[str]:
    """Return where the class names in the records contradict each other or the manifest."""
    classes = manifest and manifest.get("classes")
    first = 1 if manifest is None else manifest.get("label_base", 1)
    by_label: dict[int, set[str]] = defaultdict(set)
    for finding in findings:
        for label, names in finding["names"].items():
            by_label[int(label)].update(names)
    for label, names in sorted(by_label.items()):
        if len(names) > 1:
            return [
                f"label {label + first} is used for several classes: {first_few(sorted(names))}"
            ]
        if classes and classes[label] not in names:
            (name,) = names
            return [
                f"label {label + first} is {name} in the records, but {classes[label]} in {MANIFEST}"
            ]
    found = [name for _, (name,) in sorted(by_label.items())]
    if found != sorted(found) and all(map(_WNID.fullmatch, found)):
        first = next(a for a, b in zip(found, sorted(found), strict=True) if a != b)
        return [
            "labels do not follow the sorted order of the class names, as they do for folders "
            f"(from {first} on); do not mix these records with folders"
        ]
    return []


def summary(
    findings: list[dict[str, Any]],
    general: list[str],
    classes: dict[str, list[str]],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Combine the findings into a report."""
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
                f"{split}: {len(empty)} of {num_classes} classes have no image: {first_few(empty)}"
            )
    return {"general": general, "notes": list(notes), "splits": splits}


def table(report: dict[str, Any]) -> str:
    """Return the report as text."""
    lines = [f"{'split':12}{'images':>10}{'classes':>9}{'least':>8}{'most':>8}  problems"]
    for split, found in report["splits"].items():
        kinds = Counter(problem for _, problem, _ in found["problems"])
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
        per_class = found["images_per_class"] or [0]
        lines.append(
            f"{split:12}{found['images']:>10,}{found['classes']:>9,}{min(per_class):>8,}"
            f"{max(per_class):>8,}  {counts}"
        )
    lines += report["general"] + report["notes"]
    for split, found in report["splits"].items():
        shown = [p for p in found["problems"] if p[1] in FATAL or p[1] in SET_PROBLEMS]
        lines += [f"{split}/{name}: {problem}: {detail}" for name, problem, detail in shown[:20]]
        if len(shown) > 20:
            lines.append(f"{split}: and {len(shown) - 20} more; see the report")
    return "\n".join(lines)


def bad_names(report: dict[str, Any]) -> list[str]:
    """Return the names of the images that training cannot read, in the form of ``--exclude``."""
    return [
        f"{split}/{name}"
        for split, found in report["splits"].items()
        for name, problem, _ in found["problems"]
        if problem in FATAL
    ]


def has_set_problems(report: dict[str, Any]) -> bool:
    """Whether the set or an entire record file has a problem."""
    return any(
        problem in SET_PROBLEMS
        for found in report["splits"].values()
        for _, problem, _ in found["problems"]
    )
