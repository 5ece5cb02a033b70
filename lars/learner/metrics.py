"""Metrics as named sums over samples on the device. They are divided only once, at the end.

The mean of batch means is wrong if batches differ in size. Sums over all samples are exact for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lars.comm.world import World


class Metrics:
    """Sums of a task's metrics over samples, and the number of samples, in float64 on the model's device.

    Adding a batch does not make the host wait for the device.

    Attributes:
        scales: The task's metrics: name -> factor of the mean (100 for percent).
        totals: One sum per metric in the order of `scales`, then the number of samples.
    """

    def __init__(self, scales: Mapping[str, float], device: torch.device | str) -> None:
        """Start at zero."""
        self.scales = scales
        self.totals = torch.zeros(len(scales) + 1, dtype=torch.float64, device=device)

    def add(self, sums: Mapping[str, Tensor], samples: int) -> None:
        """Add a batch: the sum of each metric over its samples."""
        for place, name in enumerate(self.scales):
            self.totals[place] += sums[name].detach()
        self.totals[-1] += samples

    def undo(self, before: Tensor, skipped: bool | Tensor) -> None:
        """Restore the totals `before` a step if it was skipped. `skipped` may be a number on the device."""
        if isinstance(skipped, Tensor):
            self.totals.copy_(torch.where(skipped != 0, before, self.totals))
        elif skipped:
            self.totals.copy_(before)

    def all_reduce(self, world: World, name: str) -> Tensor:
        """Return the totals over all ranks, on the CPU. `name` identifies the collective."""
        return world.all_reduce(self.totals.to("cpu", copy=True), name)

    def take(self, world: World) -> Tensor:
        """Return the training totals over all ranks since the last call, on the CPU, and reset the sums to zero."""
        totals = self.all_reduce(world, "train metrics")
        self.totals.zero_()
        return totals


def count(totals: Tensor) -> int:
    """Number of samples in `Metrics.totals`."""
    return int(totals[-1])


def means(scales: Mapping[str, float], totals: Tensor) -> dict[str, float]:
    """Each metric's scaled mean over the samples in `Metrics.totals`; nan if there are no samples."""
    *sums, samples = totals.tolist()
    if not samples:
        return dict.fromkeys(scales, float("nan"))
    return {
        name: scale * value / samples
        for (name, scale), value in zip(scales.items(), sums, strict=True)
    }
