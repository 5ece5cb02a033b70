"""How far a run has come."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lars.config.plan import Plan
from lars.errors import NonFiniteError
from lars.learner.learner import StepResult
from lars.learner.metrics import count, means

# One line of metrics.jsonl.
Row = dict[str, Any]


def logged_rows(path: Path) -> list[Row]:
    """The complete rows of a metrics.jsonl, up to the first line that is none; [] if there is no such file."""
    rows = []
    try:
        for line in path.read_bytes().splitlines(keepends=True):
            row = json.loads(line)
            if not line.endswith(b"\n") or not isinstance(row, dict):
                break
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
    except (OSError, ValueError):
        return rows
    return rows


@dataclass
class Progress:
    """How far a run has come: all that a checkpoint holds besides the learner.

    Attributes:
        step: Optimizer steps taken.
        history: Rows of metrics.jsonl.
        totals: `Metrics.totals` over all ranks for the part of the unfinished epoch that has been read.
        window: The root's totals since then; every rank's are beside it in the checkpoint.
        seconds: Time spent in the steps of the unfinished epoch.
        skipped: Steps that were skipped.
        skipped_in_a_row: Consecutive steps up to now that were skipped because they were not finite.
        bad_images: A message about each image that some rank could not read.
        reading: The means of the metrics when they were last read, with the rate and the speed: a point of the curves.
            "step" says after which step.
        unread_samples: Samples over all ranks since then.
        unread_seconds: Time spent in steps since then.
        branch: Where this run left another one, if it did, and what changed; see `lars.run.branch`.
    """

    step: int = 0
    history: list[Row] = field(default_factory=list)
    totals: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    window: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    bad_images: list[str] = field(default_factory=list)
    reading: dict[str, float] = field(default_factory=dict)
    unread_samples: int = 0
    unread_seconds: float = 0.0
    branch: dict[str, Any] = field(default_factory=dict)

    def advance(self, result: StepResult, max_skipped_steps: int) -> None:
        """Count a step.

        Raises:
            NonFiniteError: Too many steps in a row were not finite.
        """
        self.step += 1
        self.seconds += result.seconds
        self.unread_seconds += result.seconds
        self.unread_samples += result.samples
        if result.taken:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        if not result.nonfinite:
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= max_skipped_steps:
            raise NonFiniteError(
                f"{max_skipped_steps} steps in a row were {result.cause}; the last checkpoint is unchanged. "
                "Lower --base-lr, lengthen --warmup-epochs, or give --clip-grad-norm"
            )

    def read(self, totals: Tensor, scales: Mapping[str, float], lr: float) -> None:
        """Take in `Metrics.totals` over all ranks since the last reading; `lr` is the last step's learning rate."""
        self.totals += totals
        speed = self.unread_samples / self.unread_seconds
        rates = {"lr": lr, "images_per_second": speed, "step": self.step}
        self.reading = means(scales, totals) | rates
        self.unread_samples, self.unread_seconds = 0, 0.0

    def new_reading(self) -> dict[str, float]:
        """The reading after the current step, without its step; {} if nothing was read then."""
        if self.reading.get("step") != self.step:
            return {}
        return {name: value for name, value in self.reading.items() if name != "step"}

    def end_epoch(self, plan: Plan, lr: float, scales: Mapping[str, float]) -> None:
        """Add the row of a finished training epoch; the next epoch's totals start at zero."""
        self.add_row("train", self.totals, self.seconds, plan, lr, scales)
        self.totals, self.seconds = torch.zeros_like(self.totals), 0.0

    def add_row(
        self,
        split: str,
        totals: Tensor,
        seconds: float,
        plan: Plan,
        lr: float,
        scales: Mapping[str, float],
    ) -> None:
        """Add a line of metrics.jsonl: the means of the metrics over an epoch's samples.

        Args:
            split: "train", "val", or "val_ema" for the moving average.
            totals: `Metrics.totals` over all ranks.
            seconds: Time spent on them.
            plan: Knows which epoch has ended.
            lr: Learning rate of the epoch's last step.
            scales: The task's metrics.
        """
        row = {
            "split": split,
            "epoch": plan.epoch_of(self.step),
            "step": self.step,
            **means(scales, totals),
            "lr": lr,
            "images_per_second": round(count(totals) / seconds, 2),
            "seconds": round(seconds, 3),
        }
        self.history.append(row)

    def last(self, split: str) -> Row | None:
        """The newest row of a split."""
        return next((row for row in reversed(self.history) if row["split"] == split), None)

    def best(self, metric: str = "top1") -> Row | None:
        """The validation row with the highest value of a metric; the earliest of equals."""
        rows = [row for row in self.history if row["split"] != "train"]
        return max(rows, key=lambda row: row[metric], default=None)
