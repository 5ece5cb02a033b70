"""Which GPU a rank uses, for all GPUs that a launcher may make visible to it."""

from __future__ import annotations

import socket

import pytest

from lars.comm.world import World
from lars.errors import UsageError
from lars.learner.device import gpu_number


class Host(World):
    """The ranks of one host. `seen` lists the GPUs that are visible to each rank."""

    def __init__(self, rank: int, seen: list[list[str]]) -> None:
        self.rank = self.local_rank = rank
        self.size = len(seen)
        self.seen = seen

    def all_gather_object(self, value, name):
        chosen = [
            visible[0 if len(visible) == 1 else rank]
            if rank < len(visible) or len(visible) == 1
            else None
            for rank, visible in enumerate(self.seen)
        ]
        gathered = [gpu and (socket.gethostname(), gpu) for gpu in chosen]
        assert gathered[self.rank] == value
        return gathered


def number(rank: int, seen: list[list[str]]) -> int:
    return gpu_number(Host(rank, seen), seen[rank])


def test_ranks_that_see_all_gpus_use_the_one_with_their_local_rank():
    assert [number(rank, [["a", "b"]] * 2) for rank in (0, 1)] == [0, 1]


def test_a_rank_that_sees_a_single_gpu_uses_it():
    """Slurm's --gpus-per-task=1 makes one GPU visible to each rank."""
    assert [number(rank, [["a"], ["b"]]) for rank in (0, 1)] == [0, 0]


@pytest.mark.parametrize("seen", [[["a"], ["a"]], [["a", "b"]] * 3, [["a", "b"], []]])
def test_more_ranks_than_gpus_are_refused(seen):
    with pytest.raises(UsageError, match="a host has fewer GPUs than ranks"):
        number(0, seen)
