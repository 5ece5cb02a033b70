"""The job-wide order: a permutation, divided among the ranks without loss or repetition."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader.order import (
    Order,
    even_bounds,
    permutation,
    sample_seeds,
    shard,
    steps_per_epoch,
)
from data.loader.sampler import epochs_from


@given(samples=st.integers(0, 500), seed=st.integers(0, 2**64), epoch=st.integers(0, 10**6))
@settings(deadline=None)
def test_permutation_holds_every_sample_once(samples, seed, epoch):
    order = permutation(samples, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(samples))


def test_permutation_never_changes():
    # A run that is resumed with another version of NumPy, or of this project, must see this order.
    assert permutation(10, seed=42, epoch=0).tolist() == [7, 1, 6, 4, 3, 5, 9, 0, 2, 8]
    assert permutation(10, seed=42, epoch=1).tolist() == [4, 9, 5, 3, 0, 2, 7, 1, 6, 8]


@given(samples=st.integers(0, 300), block=st.integers(1, 40))
@settings(deadline=None)
def test_blocks_are_shuffled_as_one(samples, block):
    order = permutation(samples, 5, 0, block).tolist()
    assert sorted(order) == list(range(samples))
    last = samples - 1
    for this, following in itertools.pairwise(order):
        if this % block != block - 1 and this != last:
            assert following == this + 1
    starts = [index for index in order if index % block == 0]
    assert starts == (permutation(len(starts), 5, 0) * block).tolist()


def test_permutations_of_neighbouring_seeds_and_epochs_are_unlike():
    orders = [permutation(10_000, seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 10  # about 1 is expected for two independent permutations
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.05


def test_permutation_is_uniform():
    # Chi-squared over all 24 orders of 4 samples (23 degrees of freedom) exceeds 49.7 with a
    # probability of 0.001.
    orders = [tuple(permutation(4, seed, 0)) for seed in range(4800)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7


def test_an_order_of_imagenet_takes_less_than_a_tenth_of_a_second():
    def seconds() -> float:
        start = time.process_time()
        permutation(1_281_167, seed=1, epoch=1)
        return time.process_time() - start

    assert min(seconds() for _ in range(5)) < 0.1


FIRST = np.zeros(1000, np.int64)  # every sample is the first copy


def test_sample_seeds_do_not_depend_on_other_samples_and_do_not_collide():
    seeds = sample_seeds(7, 3, np.arange(1000), FIRST)
    assert sample_seeds(7, 3, np.array([999, 5]), FIRST[:2])[1] == seeds[5]
    others = [
        sample_seeds(seed, epoch, np.arange(1000), FIRST + copy)
        for seed, epoch, copy in [(7, 4, 0), (8, 3, 0), (7, 3, 1), (7, 3, 2), (7, 4, 1)]
    ]
    assert len(np.unique(np.concatenate([seeds, *others]))) == 6000
    # torch's generator takes the lower 32 bits.
    assert len(np.unique(np.concatenate([seeds, *others]) & np.uint64(2**32 - 1))) == 6000


def test_sample_seeds_never_change():
    assert sample_seeds(42, 1, np.array([3, 1_281_166]), FIRST[:2]).tolist() == [
        10717792572613970916,
        12142830389666808249,
    ]


@given(samples=st.integers(1, 1000), batch_size=st.integers(1, 100))
@settings(deadline=None)
def test_bounds_are_even(samples, batch_size):
    bounds = even_bounds(samples, batch_size)
    sizes = np.diff(bounds)
    assert bounds[0] == 0
    assert bounds[-1] == samples
    assert len(sizes) == -(-samples // batch_size)
    assert sizes.max() <= batch_size
    assert sizes.max() - sizes.min() <= 1


@st.composite
def orders(draw):
    batch_size = draw(st.integers(1, 9))
    return Order(
        samples=draw(st.integers(1, 150)),
        batch_size=batch_size,
        effective_batch_size=batch_size * draw(st.integers(1, 8)),
        drop_last=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
        block=draw(st.integers(1, 5)),
        repeats=draw(st.integers(1, 5)),
    )


def drawn(order: Order, epoch: int, first_step: int, rank: int, size: int):
    """Return one rank's micro-batches: lists of (index, copy)."""
    parts = order.epoch(epoch, first_step, rank, size)
    return [list(zip(*(part.tolist() for part in pair), strict=True)) for pair in parts]


def steps_of(order: Order, epoch: int, rank: int, size: int) -> list[list[list[tuple[int, int]]]]:
    """Return one rank's micro-batches, step by step."""
    batches = drawn(order, epoch, 0, rank, size)
    full = order.effective_batch_size // order.batch_size
    per_step = -(-full // size)
    return [batches[i : i + per_step] for i in range(0, len(batches), per_step)]


@given(order=orders(), size=st.integers(1, 5), epoch=st.integers(0, 3))
@settings(deadline=None)
def test_each_step_takes_its_window_whatever_the_number_of_ranks(order, size, epoch):
    full = permutation(order.samples, order.seed, epoch, order.block).tolist()
    ranks = [steps_of(order, epoch, rank, size) for rank in range(size)]
    assert order.steps == steps_per_epoch(
        order.samples, order.effective_batch_size, order.drop_last
    )
    for step in range(order.steps):
        start = step * order.effective_batch_size
        places = range(start, min(start + order.effective_batch_size, order.samples))
        window = [(full[p // order.repeats], p % order.repeats) for p in places]
        assert not order.drop_last or len(window) == order.effective_batch_size
        dealt = [r[step] for r in ranks]
        assert len({len(batches) for batches in dealt}) == 1  # all ranks yield equally many
        # Micro-batch i went to rank i % size. Merged again, they give the window in order.
        rounds = [dealt[rank][i] for i in range(len(dealt[0])) for rank in range(size)]
        assert [batch for batch in rounds if batch] == steps_of(order, epoch, 0, 1)[step]
        dealt_samples = [sample for batch in rounds for sample in batch]
        assert sorted(dealt_samples) == sorted(window)
        assert order.repeats > 1 or dealt_samples == window
        # Copies of a sample fall into different micro-batches, or as few as possible into one.
        batches = sum(map(bool, rounds))
        for batch in rounds:
            for count in Counter(index for index, _ in batch).values():
                assert count <= -(-order.repeats // batches)
        # Empty micro-batches come last, and there are fewer of them than ranks.
        sizes = [len(batch) for batch in rounds]
        assert sizes.count(0) < size
        assert all(sizes[: len(sizes) - sizes.count(0)])


@given(order=orders(), size=st.integers(1, 5), data=st.data())
@settings(deadline=None)
def test_an_epoch_can_start_at_any_step(order, size, data):
    rank = data.draw(st.integers(0, size - 1))
    first = data.draw(st.integers(0, order.steps))
    tail = drawn(order, 2, first, rank, size)
    assert tail == [batch for step in steps_of(order, 2, rank, size)[first:] for batch in step]


def test_repeated_samples_are_the_first_ones_of_the_permutation():
    """Micro-batches hold consecutive samples, so that records can be read in one piece."""
    order = Order(20, 3, 12, drop_last=False, seed=0, repeats=3)
    first = permutation(20, 0, 0).tolist()
    step = list(order.epoch(0, 0, 0, 1))
    assert [indices.tolist() for indices, _ in step[:4]] == [
        [*first[:3]], [first[3], *first[:2]], [*first[2:4], first[0]], [*first[1:4]]]  # fmt: skip
    assert [copies.tolist() for _, copies in step[:4]] == [[0] * 3, [0, 1, 1], [1, 1, 2], [2] * 3]
    assert {i for indices, _ in step for i in indices.tolist()} == set(first[:7])
    copies = Counter(i for indices, _ in step for i in indices.tolist())
    assert [copies[i] for i in first[:7]] == [3, 3, 3, 3, 3, 3, 2]


def test_dropping_the_last_step_leaves_full_steps_only():
    order = Order(samples=23, batch_size=3, effective_batch_size=6, drop_last=True, seed=0)
    assert [len(b) for b, _ in order.epoch(0, 0, 0, 1)] == [3] * 6


def test_a_short_last_step_is_divided_evenly():
    order = Order(samples=23, batch_size=3, effective_batch_size=6, drop_last=False, seed=0)
    assert [len(b) for b, _ in order.epoch(0, 3, 0, 1)] == [2, 3]
    assert [[len(b) for b, _ in order.epoch(0, 3, r, 4)] for r in range(4)] == [[2], [3], [0], [0]]


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, [(0, 0), (1, 0), (2, 0)]), (2, [(0, 2), (1, 0), (2, 0)]), (3, [(1, 0), (2, 0), (3, 0)]),
     (7, [(2, 1), (3, 0), (4, 0)])],
)  # fmt: skip
def test_a_global_step_is_an_epoch_and_a_step_within_it(step, expected):
    begun = []

    def epoch(number, first):
        begun.append((number, first))
        yield from range(first, 3)

    steps = list(itertools.islice(epochs_from(epoch, 3, step), 9))
    assert steps == [k % 3 for k in range(step, step + 9)]
    assert begun[:3] == expected


@pytest.mark.parametrize(("batch", "effective"), [(0, 4), (8, 4)])
def test_impossible_batch_sizes_are_refused(batch, effective):
    with pytest.raises(ValueError, match="batch_size"):
        Order(samples=9, batch_size=batch, effective_batch_size=effective, drop_last=False, seed=0)


@given(samples=st.integers(0, 100), batch_size=st.integers(1, 12), size=st.integers(1, 6))
@settings(deadline=None)
def test_shards_hold_each_validation_image_once_in_order(samples, batch_size, size):
    shards = [[b.tolist() for b in shard(samples, batch_size, r, size)] for r in range(size)]
    for rank, batches in enumerate(shards):
        assert [i for batch in batches for i in batch] == list(range(rank, samples, size))
        assert all(0 < len(batch) <= batch_size for batch in batches)
