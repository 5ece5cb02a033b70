"""How far a run has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lars.errors import NonFiniteError
from lars.learner.learner import StepResult
from lars.learner.metrics import count, means

# One line of metrics.jsonl.
Row = dict[str, Any]


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
    """

    step: int = 0
    history: list[Row] = field(default_factory=list)
    totals: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    window: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    bad_images: list[str] = field(default_factory=list)

    def advance(self, result: StepResult, max_skipped_steps: int) -> None:
        """Count a step.

        Raises:
            NonFiniteError: Too many steps in a row were not finite.
        """
        self.step += 1
        self.seconds += result.seconds
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

    def take_epoch(self) -> tuple[Tensor, float]:
        """The totals of the finished training epoch and its seconds; both start again at zero."""
        taken = self.totals, self.seconds
        self.totals, self.seconds = torch.zeros_like(self.totals), 0.0
        return taken

    def add_row(
        self,
        split: str,
        totals: Tensor,
        seconds: float,
        *,
        epoch: int,
        lr: float,
        scales: Mapping[str, float],
    ) -> None:
        """Add a line of metrics.jsonl: the means of the metrics over an epoch's samples.

        Args:
            split: "train" or "val".
            totals: `Metrics.totals` over all ranks.
            seconds: Time spent on them.
            epoch: The epoch that ended, from 1.
            lr: Learning rate of the epoch's last step.
            scales: The task's metrics.
        """
        row = {
            "split": split,
            "epoch": epoch,
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
        rows = [row for row in self.history if row["split"] == "val"]
        return max(rows, key=lambda row: row[metric], default=None)
