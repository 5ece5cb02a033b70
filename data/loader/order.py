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


def sample_seeds(seed: int, epoch: int, indices: Indices, copies: Indices) -> NDArray[np.uint64]:
    """Return the seed of each sample's augmentation: a hash of (seed, epoch, index, copy).

    Each of them goes through the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), so that
    neighbouring indices, epochs or seeds give unrelated results.

    Args:
        seed: Seed of the run.
        epoch: Number of the epoch.
        indices: Numbers of the samples.
        copies: Which of its augmented copies each sample is, from 0. The seed of copy 0 is that of
            a sample without further copies.

    Returns:
        One uint64 for each sample.
    """
    state = _split_mix(np.full(len(indices), seed & _WORD, dtype=np.uint64))
    state = _split_mix(state ^ np.uint64(epoch & _WORD))
    state = _split_mix(state ^ indices.astype(np.uint64))
    return np.where(copies > 0, _split_mix(state ^ copies.astype(np.uint64)), state)


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


def copies_apart(places: Indices, repeats: int, bounds: list[int]) -> Indices:
    """Rearrange the places of a step so that copies of a sample fall into different micro-batches.

    Place p of an epoch is copy p % repeats of sample p // repeats of the permutation. If there are
    at least `repeats` micro-batches, none holds two copies of a sample. With fewer, the copies are
    distributed as evenly as possible.

    Args:
        places: Consecutive places.
        repeats: Copies of each sample.
        bounds: Boundaries of the micro-batches, from `even_bounds`.
    """
    sizes = np.diff(bounds)
    if len(places) // repeats >= sizes.max():
        # All first copies, then all second copies, ...: copies of a sample are further apart than a
        # micro-batch is long. Each micro-batch holds consecutive samples, so that records can be
        # read in one piece.
        return places[np.argsort(places % repeats, kind="stable")]
    # Neighbours go to different micro-batches, as cards are dealt; larger ones come first.
    dealt = np.empty_like(places)
    for first, part in enumerate(np.argsort(-sizes, kind="stable")):
        dealt[bounds[part] : bounds[part + 1]] = places[first :: len(sizes)]
    return dealt


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
        repeats: Augmented copies of each sample in its step (repeated augmentation; Hoffer et al.,
            2020; Berman et al., 2019). An epoch still has `samples` places. They go to the first
            ceil(samples / repeats) samples of the permutation.
    """

    samples: int
    batch_size: int
    effective_batch_size: int
    drop_last: bool
    seed: int
    block: Blocks = 1
    repeats: int = 1

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

    def epoch(
        self, epoch: int, first_step: int, rank: int, size: int
    ) -> Iterator[tuple[Indices, Indices]]:
        """Yield each of this rank's micro-batches, from `first_step` of `epoch` on.

        Micro-batch i of a step belongs to rank i % size. If a short last step has none left for
        this rank, it yields an empty one instead, so that all ranks yield equally many.

        Yields:
            The indices of the samples, and the number of the copy of each, from 0.
        """
        order = permutation(self.samples, self.seed, epoch, self.block)
        for step in range(first_step, self.steps):
            start = step * self.effective_batch_size
            places = np.arange(start, min(start + self.effective_batch_size, self.samples))
            bounds = even_bounds(len(places), self.batch_size)
            if self.repeats > 1:
                places = copies_apart(places, self.repeats, bounds)
            batches = len(bounds) - 1
            for i in range(rank, -(-batches // size) * size, size):
                part = places[bounds[i] : bounds[i + 1]] if i < batches else places[:0]
                yield order[part // self.repeats], part % self.repeats


def shard(samples: int, batch_size: int, rank: int, size: int) -> Iterator[Indices]:
    """Yield the validation batches of one rank.

    They hold images rank, rank + size, rank + 2 * size, ... in order, each once.
    """
    mine = np.arange(rank, samples, size, dtype=np.int64)
    for start in range(0, len(mine), batch_size):
        yield mine[start : start + batch_size]
