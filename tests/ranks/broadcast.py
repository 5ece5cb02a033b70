"""Run on 2 ranks. The root broadcasts a tree of tensors in small chunks, and each rank prints whether it is equal.

Each rank also checks the other collectives of the world.
"""

import os

import torch

from lars.comm import start, state
from lars.comm.world import World


def tree() -> dict:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 4, 5, 6, generator=generator)
    return {
        "channels last": image.to(memory_format=torch.channels_last),
        "half": [1, "x", torch.tensor(3.0, dtype=torch.bfloat16)],
        7: {"counter": torch.arange(1000), "empty": torch.empty(0), "flag": torch.tensor(True)},
        "nothing": None,
        "pair": (1, 2.5),
        "every second": torch.arange(10.0)[::2],
    }


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        dense = one.is_contiguous() or one.is_contiguous(memory_format=torch.channels_last)
        strides = one.stride() == other.stride() or not dense
        return one.dtype == other.dtype and strides and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(same, one, other))
    return one == other


def collectives_are_right(world: World) -> bool:
    rank, ones = world.rank, torch.ones(2) + world.rank
    weights = {"weights": ones.clone()}
    world.broadcast(weights)
    transposed = torch.arange(6.0).view(2, 3).T + rank
    return all((
        world.all_reduce(ones, "sum").tolist() == [3, 3],
        ones.tolist() == [1 + rank] * 2,  # the input is unchanged
        world.all_gather(transposed, "gather").tolist() == [(transposed - rank + r).tolist() for r in (0, 1)],
        world.all_gather_object(rank, "objects") == [0, 1],
        world.broadcast_object(rank, "object") == 0,
        weights["weights"].tolist() == [1, 1],
    ))  # fmt: skip


state._CHUNK_BYTES = 1000
start.join()
world = start.join()  # as a second job in the same process does
received = state.broadcast_state(tree() if world.is_root else None, world)
outcome = same(tree(), received) and collectives_are_right(world)
os.write(1, f"RANK {world.rank} {outcome}\n".encode())  # in one go: lines of two ranks may not mix
