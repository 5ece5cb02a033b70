"""The course of a check: make tasks, inspect, report. An interrupted check can be continued."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from typing import Any

from data.check import inspection, report, tasks
from data.check.inspection import Records, Task
from data.samples.listing import first_few
from data.samples.record_files import MANIFEST
from data.tooling.atomic import locked, read_json, replacing, write_json
from data.tooling.pool import Pool

_LINE_BREAK = re.compile(r"[\r\n]")


def check(options: argparse.Namespace, pool: Pool) -> bool:
    """Check, report, and return whether all is well (unusual but readable images are)."""
    if not options.report:
        return _check(options, pool, None)
    notes = options.report + ".unfinished"
    with locked(notes):
        well = _check(options, pool, notes)
        shutil.rmtree(notes, ignore_errors=True)
    return well


def _check(options: argparse.Namespace, pool: Pool, notes: str | None) -> bool:
    records = options.data_dir
    if options.data:
        plan = tasks.plan_layout(options.data, options.label_base, options.index_dir)
        records = options.data if any(isinstance(task, Records) for task in plan.tasks) else None
    elif options.data_dir:
        plan = tasks.plan_records(options.data_dir, options.label_base)
    else:
        plan = tasks.plan_trees(options.train_dir, options.val_dir)
    findings = _all_findings(plan.tasks, pool, notes)
    if records:
        manifest = read_json(os.path.join(records, MANIFEST))
        plan.general.extend(report.duplicated_files(findings))
        plan.general.extend(report.class_name_conflicts(findings, manifest))
    result = report.summary(findings, plan.general, plan.classes, plan.notes)
    bad = report.bad_names(result)
    unlistable = [repr(name) for name in bad if _LINE_BREAK.search(name)]
    if unlistable:
        result["general"].append(
            "a list for --exclude cannot hold names with a line break; rename or remove these "
            f"files: {first_few(unlistable)}"
        )
    print(report.table(result))
    if options.report:
        write_json(options.report, result)
    if options.list:
        with replacing(options.list) as file:
            lines = [name for name in bad if not _LINE_BREAK.search(name)] or ["# none"]
            file.write("".join(f"{name}\n" for name in lines).encode(errors="surrogateescape"))
    return not (bad or report.has_set_problems(result) or result["general"])


def _all_findings(jobs: Sequence[Task], pool: Pool, notes: str | None) -> list[dict[str, Any]]:
    """Inspect all tasks. With a folder of `notes`, skip those that an interrupted run finished."""
    findings, remaining = [], []
    for task in jobs:
        earlier = read_json(_note(notes, task)) if notes else None
        if earlier is None:
            remaining.append((task, _note(notes, task) if notes else None))
        else:
            findings.append(earlier)
    return findings + list(pool.work(_inspect_and_note, remaining, "files"))


def _inspect_and_note(job: tuple[Task, str | None]) -> dict[str, Any]:
    task, note = job
    finding = inspection.inspect(task)
    if note:
        write_json(note, finding)
    return finding


def _note(notes: str, task: Task) -> str:
    """Return the path of a task's note: a hash of the task and of its files' sizes and times."""
    sha = hashlib.sha256(repr(task).encode(errors="surrogateescape"))
    for path in task.paths:
        try:
            status = os.stat(path)
            sha.update(repr((status.st_size, status.st_mtime_ns)).encode())
        except OSError:
            sha.update(b"missing")
    return os.path.join(notes, sha.hexdigest()[:32] + ".json")
