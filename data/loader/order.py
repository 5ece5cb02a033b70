"""Which sample goes to which step, micro-batch and rank: arithmetic on plain integers.

The order belongs to the job: it depends on (samples, seed, epoch) only. So every combination of
ranks and accumulation that gives the same effective batch sees the same micro-batches, and a run can
resume on a different number of ranks. No state is carried from step to step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_WORD = 2**64 - 1


# Number of consecutive samples that are shuffled as one; or the first sample of each such block.
Blocks = int | Indices


def permutation(samples: int, seed: int, epoch: int, block: Blocks = 1) -> Indices:
    """Return the order of one epoch: every number of 0 .. samples - 1 once, int64.

    With `block` > 1, blocks of that many consecutive samples are shuffled, and the order within
    each block is kept, so that a file system can read a block in one piece. Blocks of unequal sizes
    are given by the number of the first sample in each, ascending from 0.

    The numbers are sorted by random keys: the raw 64-bit words of Philox-4x64 with key (seed,
    epoch), whose lowest bits are replaced by the number itself to break ties. NumPy guarantees that
    the raw words of its bit generators never change, but not the stream of `Generator.permutation`;
    a run that is resumed with another version of NumPy keeps its order.
    """
    if not isinstance(block, int):
        return _by_blocks(block, samples, seed, epoch)
    if block > 1:
        return _by_blocks(np.arange(0, samples, block), samples, seed, epoch)
    bits = np.uint64(max(samples, 1).bit_length())
    key = np.array([seed & _WORD, epoch & _WORD], dtype=np.uint64)
    keys = np.random.Philox(key=key).random_raw(samples) >> bits << bits
    keys |= np.arange(samples, dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << bits) - np.uint64(1)
    return keys.astype(np.int64)


def _by_blocks(starts: Indices, samples: int, seed: int, epoch: int) -> Indices:
    """Return the samples of all blocks, with the blocks in random order."""
    order = permutation(len(starts), seed, epoch)
    sizes = np.diff(starts, append=samples)[order]
    # The block that begins at position p of the epoch holds starts + (0, 1, ...) there.
    shift = starts[order] - (np.cumsum(sizes) - sizes)
    return np.repeat(shift, sizes) + np.arange(samples)


def sample_seeds(seed: int, epoch: int, indices: Indices) -> NDArray[np.uint64]:
    """Return the seed of each sample's augmentation, uint64: a hash of (seed, epoch, index).

    Each of the three goes through the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), so
    that neighbouring indices, epochs or seeds give unrelated results.
    """
    state = _split_mix(np.full(len(indices), seed & _WORD, dtype=np.uint64))
    state = _split_mix(state ^ np.uint64(epoch & _WORD))
    return _split_mix(state ^ indices.astype(np.uint64))


def _split_mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def steps_per_epoch(samples: int, effective_batch_size: int, drop_last: bool) -> int:
    """Return the number of optimizer steps in one epoch.

    Unless `drop_last`, this counts a short last step.
    """
    if drop_last:
        return samples // effective_batch_size
    return -(-samples // effective_batch_size)


def even_bounds(samples: int, most: int) -> list[int]:
    """Divide `samples` evenly into as few parts as possible, each of `most` samples or fewer.

    Returns:
        The ceil(samples / most) + 1 boundaries: part i holds samples b[i] .. b[i + 1]. The sizes of
        the parts differ by at most one.
    """
    parts = -(-samples // most)
    return [i * samples // parts for i in range(parts)] + [samples]


@dataclass(frozen=True)
class Order:
    """The job-wide order of training samples.

    Attributes:
        samples: Number of training samples.
        batch_size: Samples of a full micro-batch.
        effective_batch_size: Samples of a full optimizer step, over all ranks and accumulated
            micro-batches.
        drop_last: Leave out the short last step of an epoch.
        seed: Seed of the run.
        block: Number of consecutive samples that are shuffled as one, or the first sample of each
            such block.
    """

    samples: int
    batch_size: int
    effective_batch_size: int
    drop_last: bool
    seed: int
    block: Blocks = 1

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.effective_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must lie between 1 and effective_batch_size "
                f"{self.effective_batch_size}"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch."""
        return steps_per_epoch(self.samples, self.effective_batch_size, self.drop_last)

    def epoch(self, epoch: int, first_step: int, rank: int, size: int) -> Iterator[Indices]:
        """Yield the indices of each of this rank's micro-batches, from `first_step` of `epoch` on.

        Micro-batch i of a step belongs to rank i % size. If a short last step has none left for
        this rank, it yields an empty one instead, so that all ranks yield equally many.
        """
        order = permutation(self.samples, self.seed, epoch, self.block)
        for step in range(first_step, self.steps):
            start = step * self.effective_batch_size
            window = order[start : start + self.effective_batch_size]
            bounds = even_bounds(len(window), self.batch_size)
            batches = len(bounds) - 1
            for i in range(rank, -(-batches // size) * size, size):
                yield window[bounds[i] : bounds[i + 1]] if i < batches else window[:0]


def shard(samples: int, batch_size: int, rank: int, size: int) -> Iterator[Indices]:
    """Yield the validation batches of one rank.

    They hold images rank, rank + size, rank + 2 * size, ... in order, each once.
    """
    mine = np.arange(rank, samples, size, dtype=np.int64)
    for start in range(0, len(mine), batch_size):
        yield mine[start : start + batch_size]
