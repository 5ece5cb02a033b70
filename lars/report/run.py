"""A run as the report shows it: everything that its folder holds about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lars import expected
from lars.observe import layer_file
from lars.observe.layer_file import LayerHistory
from lars.plot import Curves, labels
from lars.report.curves import Curve
from lars.run.outcome import outcome
from lars.run.records import Row, RunRecord


@dataclass(frozen=True)
class ReportedRun:
    """A run and its place in the report.

    Attributes:
        number: Number of the run in the report, from 0. It determines the colour.
        name: What the report calls the run.
        record: The rows and flags of the run.
        summary: See `read_summary`.
        readings: The training metrics over optimizer steps, by name; see --log-every of the trainer.
        layers: The values of every layer. None if the run has not recorded any.
        published: The published runs with which the run compares, if there are any.
    """

    number: int
    name: str
    record: RunRecord
    summary: dict[str, Any]
    readings: dict[str, Curve]
    layers: LayerHistory | None
    published: expected.Curve | None

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps per epoch."""
        rows = self.record.rows
        known = self.record.plan.get("steps_per_epoch")
        return known or (rows[-1]["step"] / rows[-1]["epoch"] if rows else 1)

    def rows(self, split: str, metric: str) -> list[Row]:
        """The rows of a split that have a metric."""
        return [row for row in self.record.split(split) if metric in row]


def read_all(records: Sequence[RunRecord]) -> list[ReportedRun]:
    """Read what the run folders hold. Parts that are missing or not yet complete are left out.

    A run is called by its folder. If the folder has a default name, which is long, it is called by the flags that
    distinguish it from the other runs.
    """
    names = [
        label
        if label and record.flags.get("run_name", "") is None
        else record.folder.resolve().name
        for label, record in zip(labels(records), records, strict=True)
    ]
    return [
        _read(number, name, record)
        for number, (name, record) in enumerate(zip(names, records, strict=True))
    ]


def _read(number: int, name: str, record: RunRecord) -> ReportedRun:
    summary = read_summary(record)
    return ReportedRun(
        number=number,
        name=name,
        record=record,
        summary=summary,
        readings={
            tag: Curve(*np.array(points, dtype=float).T)
            for tag, points in Curves(record).readings.items()
        },
        layers=_read_layers(record),
        published=expected.curves().get(summary["expected_curve"]),
    )


def read_summary(record: RunRecord) -> dict[str, Any]:
    """The content of summary.json, with the values that follow from the rows. The file may be missing."""
    try:
        summary = json.loads((record.folder / "summary.json").read_bytes())
    except (OSError, ValueError):
        summary = {}
    known = {
        "state": "unknown",
        "written": "",
        "step": record.rows[-1]["step"] if record.rows else 0,
        "total_steps": record.plan.get("total_steps"),
        "skipped": 0,
        "skipped_steps": [],
        "notes": [],
        "bad_images": 0,
        "expected_curve": None,
        "warnings": [],
        "environment": record.description.get("versions", {}),
    }
    metric, target = summary.get("metric", "top1"), record.flags.get("target_top1")
    return known | summary | outcome(record, metric=metric, target=target)


def _read_layers(record: RunRecord) -> LayerHistory | None:
    try:
        return layer_file.read(record.folder)
    except FileNotFoundError:
        return None
