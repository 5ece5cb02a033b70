"""The progress of a run: its steps, its metrics and its history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lars.config.plan import Plan
from lars.errors import NonFiniteError
from lars.learner.learner import StepResult
from lars.learner.metrics import count, means
from lars.run.records import Row

# So many skipped steps, and so many notes, are recorded. A run with fp16 may skip many steps.
RECORDED = 100


@dataclass
class Progress:
    """The progress of a run. A checkpoint stores it besides the learner.

    Attributes:
        step: Optimizer steps so far, including skipped ones.
        history: Rows of metrics.jsonl.
        totals: `Metrics.totals` over all ranks, from the start of the unfinished epoch to the last reading.
        window: The root's totals since the last reading. The checkpoint also stores those of every rank.
        seconds: Time spent in the steps of the unfinished epoch.
        data_seconds: The part of `seconds` in which the root waited for data.
        exchange_seconds: The part of `seconds` in which the root waited for the sums of the gradients.
        skipped: Number of skipped steps.
        skipped_in_a_row: Consecutive steps up to now that were skipped because they were not finite.
        bad_images: A message about each image that a rank could not read.
        reading: The last reading, which is a point of the curves; see `read`.
        unread_samples: Samples over all ranks since the last reading.
        unread_seconds: Time spent in steps since the last reading.
        unread_data_seconds: The part of `unread_seconds` in which the root waited for data.
        unread_grad_norm: The largest norm of a step's gradient since the last reading.
        notes: What observers found, such as the layer that caused a divergence: the "step" and the "text" of each.
        skipped_steps: The "step" and the "cause" of the first skipped steps.
        branch: If this run is a branch: its starting point and the flags that changed; see `lars.run.branch`.
        init: If this run started with the weights of --init: their file and how it fits; see `lars.run.initial.load`.
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
    init: dict[str, Any] = field(default_factory=dict)
    data_seconds: float = 0.0
    exchange_seconds: float = 0.0
    unread_data_seconds: float = 0.0
    unread_grad_norm: float = 0.0
    skipped_steps: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def starting(cls, totals: Tensor) -> Progress:
        """The progress of a new run; `totals` are those of `Metrics`, whose shape its own have."""
        zeros = torch.zeros_like(totals, device="cpu")
        return cls(totals=zeros, window=zeros.clone())

    def advance(self, result: StepResult) -> None:
        """Count a step."""
        self.step += 1
        self.seconds += result.seconds
        self.data_seconds += result.data_seconds
        self.exchange_seconds += result.exchange_seconds
        self.unread_seconds += result.seconds
        self.unread_data_seconds += result.data_seconds
        if result.taken:
            self.unread_grad_norm = max(self.unread_grad_norm, result.grad_norm)
        self.unread_samples += result.samples
        if result.taken:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += result.nonfinite
        if self.skipped <= RECORDED:
            self.skipped_steps.append({"step": self.step, "cause": result.cause})

    def refuse_divergence(self, result: StepResult, max_skipped_steps: int) -> None:
        """End the run if too many steps in a row were not finite, the last one with this result.

        Raises:
            NonFiniteError: They were.
        """
        if self.skipped_in_a_row >= max_skipped_steps:
            raise NonFiniteError(
                f"{max_skipped_steps} steps in a row were {result.cause}; the last checkpoint is unchanged. "
                "Lower --base-lr, increase --warmup-epochs, or use --clip-grad-norm"
            )

    def note(self, text: str) -> None:
        """Record what an observer found after the current step. The summary of the run and its report show it."""
        if len(self.notes) < RECORDED:
            self.notes.append({"step": self.step, "text": text})

    def read(
        self,
        totals: Tensor,
        scales: Mapping[str, float],
        lr: float,
        peak_memory: int | None = None,
    ) -> None:
        """Record a reading of the metrics. All its values are about the steps since the last reading.

        Besides the means of the metrics, the learning rate and the "step", a reading has

        * "images_per_second": the speed of training over all ranks,
        * "data_share": the share of the time in which the root waited for data, between 0 and 1,
        * "grad_norm": the largest norm of a step's gradient. Skipped steps do not count.
        * "gpu_memory_gib": the most memory that the job has used on the root's GPU so far. Missing on CPUs.

        Args:
            totals: `Metrics.totals` over all ranks since the last reading.
            scales: The task's metrics.
            lr: Learning rate of the last step.
            peak_memory: Memory that the root's GPU has used so far, in bytes.
        """
        self.totals += totals
        self.reading = means(scales, totals) | {
            "lr": lr,
            "images_per_second": self.unread_samples / self.unread_seconds,
            "data_share": self.unread_data_seconds / self.unread_seconds,
            "grad_norm": self.unread_grad_norm,
            "step": self.step,
        }
        if peak_memory is not None:
            self.reading["gpu_memory_gib"] = peak_memory / 2**30
        self.unread_samples, self.unread_seconds = 0, 0.0
        self.unread_data_seconds = self.unread_grad_norm = 0.0

    def new_reading(self) -> dict[str, float]:
        """The reading after the current step, without its "step". Empty if the metrics were not read after it."""
        if self.reading.get("step") != self.step:
            return {}
        return {name: value for name, value in self.reading.items() if name != "step"}

    def end_epoch(self, plan: Plan, lr: float, scales: Mapping[str, float]) -> None:
        """Add the row of a finished training epoch, and reset the totals."""
        self.add_row("train", self.totals, self.seconds, plan, lr, scales)
        self.history[-1] |= {
            "data_seconds": round(self.data_seconds, 3),
            "exchange_seconds": round(self.exchange_seconds, 3),
        }
        self.totals, self.seconds = torch.zeros_like(self.totals), 0.0
        self.data_seconds = self.exchange_seconds = 0.0

    def add_row(
        self,
        split: str,
        totals: Tensor,
        seconds: float,
        plan: Plan,
        lr: float,
        scales: Mapping[str, float],
    ) -> None:
        """Add a row for metrics.jsonl: the means of the metrics over the samples of an epoch.

        Args:
            split: "train", "val", or "val_ema" for the moving average.
            totals: `Metrics.totals` over all ranks.
            seconds: Time spent on these samples.
            plan: The plan, which gives the number of the epoch.
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
        """The newest row of a split, if there is one."""
        return next((row for row in reversed(self.history) if row["split"] == split), None)

    def best(self, metric: str = "top1") -> Row | None:
        """The validation row with the highest value of a metric. If several are equal, the earliest. No row is nan."""
        rows = [
            row for row in self.history if row["split"] != "train" and row[metric] == row[metric]
        ]
        return max(rows, key=lambda row: row[metric], default=None)
