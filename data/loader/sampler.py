"""The micro-batches that one rank's loader reads next."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from data import Batch, Share
from data.loader.order import Blocks, Indices, Order, shard


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one micro-batch to read.

    Attributes:
        epoch: Number of the epoch, from 0.
        indices: Numbers of the samples.
        copies: Which of its augmented copies each sample is, from 0.
    """

    epoch: int
    indices: Indices
    copies: Indices


class TrainSampler:
    """One rank's micro-batches of an epoch.

    The loader sets `epoch` and `first_step` before each pass.
    """

    def __init__(self, samples: int, share: Share, block: Blocks = 1, repeats: int = 1) -> None:
        self.order = Order(
            samples,
            share.batch_size,
            share.effective_batch_size,
            share.drop_last,
            share.seed,
            block,
            repeats,
        )
        self.rank, self.size = share.rank, share.size
        self.epoch = self.first_step = 0

    def __iter__(self) -> Iterator[MicroBatch]:
        for part in self.order.epoch(self.epoch, self.first_step, self.rank, self.size):
            yield MicroBatch(self.epoch, *part)


class ValSampler:
    """One rank's share of the validation images."""

    def __init__(self, samples: int, share: Share) -> None:
        self.arguments = samples, share.val_batch_size, share.rank, share.size

    def __iter__(self) -> Iterator[MicroBatch]:
        for indices in shard(*self.arguments):
            yield MicroBatch(0, indices, np.zeros_like(indices))


def epochs_from(
    epoch: Callable[[int, int], Iterator[Batch]], steps: int, step: int
) -> Iterator[Batch]:
    """Chain epochs of `steps` optimizer steps, from global step `step` on, without end.

    Args:
        epoch: Called with the number of an epoch and its first step.
        steps: Optimizer steps of an epoch; at least 1.
        step: Optimizer steps that were taken before.
    """
    number, first = divmod(step, steps)
    yield from epoch(number, first)
    for later in itertools.count(number + 1):
        yield from epoch(later, 0)
