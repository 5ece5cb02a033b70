"""Forward passes of a task on one device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lars.learner.metrics import Metrics
from lars.learner.task import Batch, Task

AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Forward:
    """Runs batches through networks and measures the results, for training and validation."""

    def __init__(self, task: Task, device: torch.device, amp: str = "off") -> None:
        """Choose the task, the device, and the type that torch.autocast uses: off, bf16 or fp16."""
        self.task, self.device = task, device
        self.amp_type = AMP_TYPES[amp]

    def prepared(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Copy the batches of a loader to the device one by one."""
        return (self.task.prepare(batch, self.device) for batch in batches)

    def forward(self, batch: Batch, model: nn.Module, metrics: Metrics) -> Tensor:
        """Return the sum of the losses of a prepared batch under `model`, and add the batch to `metrics`."""
        with torch.autocast(self.device.type, self.amp_type, enabled=self.amp_type is not None):
            loss, sums = self.task.loss_and_sums(model, batch)
        metrics.add(sums, self.task.samples_in(batch))
        return loss
