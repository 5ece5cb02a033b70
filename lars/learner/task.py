"""The contract of a task: what a batch is, what the loss is, and what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

# (images, labels), as a loader gives them.
Batch = tuple[Tensor, Tensor]


class Task(Protocol):
    """What the network learns. The learner, the metrics and the observers know nothing else of it.

    To add a metric to a task, add its name to `scales` and its sum to what `loss_and_sums` returns.
    """

    @property
    def scales(self) -> Mapping[str, float]:
        """Metric -> factor of its mean over the samples (100 for percent). "loss" is one of them."""
        ...

    @property
    def best(self) -> str:
        """The metric whose highest validation value marks the best checkpoint."""
        ...

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        """Bring a batch to the device, as the network's input."""
        ...

    def samples_in(self, batch: Batch) -> int:
        """Number of samples in a batch."""
        ...

    def loss_and_sums(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the losses over a batch's samples, and the sum of each metric."""
        ...
