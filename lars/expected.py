"""The accuracy that published runs had after each epoch, and how a run compares with it.

expected.json holds the curves of ResNet-50 on ImageNet, with their source and its limits. The module imports only the
standard library, so that errors about flags appear at once.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Training images and classes of ImageNet.
IMAGENET_SIZE, IMAGENET_CLASSES = 1_281_167, 1000
# Up to this many optimizer steps, steps describe large-batch runs better than epochs do.
_EARLY_STEPS, _EARLY_BATCH = 330, 8192
# A curve of another batch size is used if the sizes differ by at most this factor.
_NEAR = 1.3
# Schedules of equal length differ by at most this factor. Otherwise only the first third of the schedule is compared.
_SAME_SCHEDULE = 1.1
# An accuracy is far too low below this share of the lowest published one.
FAR_BELOW = 0.5


@dataclass(frozen=True)
class Range:
    """The published accuracies that a value compares with.

    Attributes:
        low: Lowest top-1 accuracy in percent.
        high: Highest top-1 accuracy in percent.
        runs: Number of runs.
        when: The epochs or steps after which they were measured.
    """

    low: float
    high: float
    runs: int
    when: str

    def __str__(self) -> str:
        return f"{self.low:.1f} to {self.high:.1f} % {self.when} ({self.runs} runs)"


@dataclass(frozen=True)
class Curve:
    """The pooled runs of similar batch sizes.

    Attributes:
        name: What --expected-curve calls it.
        batch: Smallest and largest effective batch size.
        runs: Number of runs.
        base_lr: Smallest and largest peak learning rate.
        warmup_epochs: Shortest and longest warm-up.
        schedule_epochs: Shortest and longest schedule.
        falls: Percent of the runs whose accuracy fell between two evaluations, and the largest fall in points.
        epochs: The epochs after which runs were evaluated.
        n: Number of runs at each of these epochs.
        min: Lowest accuracy in percent at each of these epochs, and so on.
        p5: 5th percentile.
        median: Median.
        p95: 95th percentile.
        max: Highest accuracy.
    """

    name: str
    batch: tuple[int, int]
    runs: int
    base_lr: tuple[float, float]
    warmup_epochs: tuple[float, float]
    schedule_epochs: tuple[int, int]
    falls: dict[str, float]
    epochs: Sequence[int]
    n: Sequence[int]
    min: Sequence[float]
    p5: Sequence[float]
    median: Sequence[float]
    p95: Sequence[float]
    max: Sequence[float]

    def last_epoch(self, schedule_epochs: int) -> int:
        """The last epoch that compares with a run of this many epochs.

        Accuracies rise as the learning rate decays, so late epochs compare only between schedules of the same length.
        """
        shortest, longest = self.schedule_epochs
        if shortest / _SAME_SCHEDULE <= schedule_epochs <= longest * _SAME_SCHEDULE:
            return self.epochs[-1]
        return min(shortest, schedule_epochs) // 3

    def at(self, epoch: int, step: int, schedule_epochs: int) -> Range | None:
        """The published accuracies to compare with.

        Args:
            epoch: Finished epochs.
            step: Finished optimizer steps.
            schedule_epochs: Epochs of the whole run.

        Returns:
            The range, or None if no published value is comparable.
        """
        if self.batch[1] >= _EARLY_BATCH and step <= _EARLY_STEPS:
            return _by_steps(step)
        if not self.epochs[0] <= epoch <= min(self.epochs[-1], self.last_epoch(schedule_epochs)):
            return None
        before = max(i for i, published in enumerate(self.epochs) if published <= epoch)
        after = min(i for i, published in enumerate(self.epochs) if published >= epoch)
        first, last = self.epochs[before], self.epochs[after]
        when = f"after epoch {first}" if first == last else f"after epochs {first} and {last}"
        return Range(self.min[before], self.max[after], min(self.n[before], self.n[after]), when)


def _by_steps(step: int) -> Range | None:
    """The published accuracies of large batches after a number of optimizer steps."""
    buckets = _file()["early_by_steps"]
    if step < buckets[0]["steps"][0]:
        return None
    before = max(i for i, bucket in enumerate(buckets) if bucket["steps"][0] <= step)
    after = min(i for i, bucket in enumerate(buckets) if bucket["steps"][1] >= step)
    before, after = min(before, after), max(before, after)
    first, last = buckets[before], buckets[after]
    when = f"after {first['steps'][0]} to {last['steps'][1]} steps"
    return Range(first["min"], last["max"], min(first["n"], last["n"]), when)


@functools.cache
def _file() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "expected.json").read_bytes())


@functools.cache
def curves() -> dict[str, Curve]:
    """All curves by name, in the order of their batch sizes."""
    return {row["name"]: Curve(**row) for row in _file()["curves"]}


def curve_near(batch: int) -> Curve | None:
    """The curve of the nearest batch size. None if all batch sizes are too different."""

    def distance(curve: Curve) -> float:
        smallest, largest = curve.batch
        return math.log(max(smallest / batch, batch / largest, 1))

    nearest = min(curves().values(), key=distance)
    return nearest if distance(nearest) <= math.log(_NEAR) else None
