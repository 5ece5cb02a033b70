"""The results of a run, computed from its rows in metrics.jsonl. This module does not load torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lars.run.records import Row, RunRecord

# Where the time of a training step goes.
PARTS = ("data", "exchange", "compute")


def outcome(
    record: RunRecord, *, metric: str = "top1", target: float | None = None
) -> dict[str, Any]:
    """Summarise a run, finished or not.

    The rows of a resumed run cover all its jobs, so these are values of the whole run. Steps that were lost when a job
    was killed, and taken again by the next job, count once.

    Args:
        record: The run. A training row without "images_per_second" is an unfinished epoch, of which only the time
            counts.
        metric: The metric of the best validation.
        target: Value of the metric to reach.

    Returns:
        A dict for JSON:

        * "metric": the name of the metric.
        * "best": the best validation of any network, and "last": the last one of the trained network. None without any.
        * "target": its "value", and the "epoch" and the "training_hours" after which a validation first reached it,
          which are None if none has. None without a target.
        * "images_per_second": mean speed of the training steps over all ranks. None before the end of an epoch.
        * "hours": hours spent in training steps and in validations.
        * "time_share": see `time_share`.
    """
    validations = [row for row in record.rows if row.get("split") != "train"]
    comparable = [row for row in validations if math.isfinite(row.get(metric, math.nan))]
    reached = next(
        (row for row in comparable if target is not None and row[metric] >= target), None
    )
    return {
        "metric": metric,
        "best": _results(max(comparable, key=lambda row: row[metric], default=None)),
        "last": _results(next(reversed(record.split("val")), None)),
        "target": None if target is None else {"value": target, **_when(record, reached)},
        "images_per_second": _speed(record),
        "hours": {"training": _hours(record.split("train")), "validation": _hours(validations)},
        "time_share": time_share(record.split("train")),
    }


def time_share(rows: Iterable[Row]) -> dict[str, float]:
    """The shares of the time of training steps, as fractions of 1. Empty if the rows have no measurement.

    Returns:
        "data": rank 0 waited for batches. "exchange": it waited for the sums of the gradients. "compute": the rest.
        `lars.learner.learner.StepResult` describes what is measured.
    """
    measured = [row for row in rows if "data_seconds" in row and row["seconds"]]
    total = sum(row["seconds"] for row in measured)
    if not total:
        return {}
    data, exchange = (sum(row[f"{part}_seconds"] for row in measured) / total for part in PARTS[:2])
    return dict(zip(PARTS, (data, exchange, 1 - data - exchange), strict=True))


def _results(row: Row | None) -> Row | None:
    """The results of a validation. A value that is not finite becomes None, as JSON requires."""
    if row is None:
        return None
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
        if name not in ("lr", "images_per_second", "seconds")
    }


def _when(record: RunRecord, row: Row | None) -> dict[str, Any]:
    """The epoch of a row, and the hours of training until then."""
    if row is None:
        return {"epoch": None, "training_hours": None}
    return {
        "epoch": row["epoch"],
        "training_hours": record.training_seconds(row["epoch"]) / 3600,
    }


def _hours(rows: Iterable[Row]) -> float:
    return sum(row["seconds"] for row in rows) / 3600


def _speed(record: RunRecord) -> float | None:
    finished = [row for row in record.split("train") if "images_per_second" in row]
    total = sum(row["seconds"] for row in finished)
    if not total:
        return None
    return sum(row["images_per_second"] * row["seconds"] for row in finished) / total


def reached(target: dict[str, Any]) -> str:
    """When a run reached its target."""
    if target["epoch"] is None:
        return "not reached"
    time = duration(3600 * target["training_hours"])
    return f"reached in epoch {target['epoch']}, after {time} of training"


def duration(seconds: float) -> str:
    """A time for people.

    Example:
        >>> duration(0.25), duration(65), duration(7260)
        ('0.25 s', '1 min 5 s', '2 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"
