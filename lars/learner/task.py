"""The contract of a task, which defines the batches, the loss and the metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

# (images, labels), as a loader delivers them.
Batch = tuple[Tensor, Tensor]


class Task(Protocol):
    """What the network learns. The learner, the metrics and the observers use only these members.

    To add a metric to a task, add its name to `scales`, and add its sum to the result of `loss_and_sums`.
    """

    @property
    def scales(self) -> Mapping[str, float]:
        """Name of each metric -> factor of its mean over the samples (100 for percent). One of them is "loss"."""
        ...

    @property
    def best(self) -> str:
        """The metric whose highest validation value marks the best checkpoint."""
        ...

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        """Copy a batch to the device and turn it into the network's input."""
        ...

    def samples_in(self, batch: Batch) -> int:
        """Number of samples in a batch."""
        ...

    def loss_and_sums(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the losses and the sum of each metric over the samples of a batch."""
        ...


class Setup(NamedTuple):
    """The network and the task of a run.

    `lars.config.config.Config.task` names the function that returns it. The arguments of the function are the flags,
    the source of the images, the world, and the classification network that --model names, with initial weights from
    the seed. The function may change that network.

    Attributes:
        model: The network to train. Parameters that do not require gradients keep their values.
        task: The loss, the metrics, and what a batch is.
        rates: Beginning of a parameter's name -> factor of its learning rate. Other parameters have the factor 1.
        augment: Changes each prepared batch of the training, but none of the validation. All its randomness comes from
            its second argument, so that it does not depend on the number of ranks. None: batches stay as they are.
    """

    model: nn.Module
    task: Task
    rates: Mapping[str, float] = MappingProxyType({})
    augment: Callable[[Batch, Random], Batch] | None = None
