"""Checks that all ranks agree."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import nn

from lars.comm.world import World
from lars.config.config import Config
from lars.errors import UsageError
from lars.learner.device import on_cpu
from lars.optim.base import choose_path
from lars.run.identity import same_on_all_ranks, same_run, versions


def check_ranks_agree(world: World, config: Config, source: Any) -> None:
    """Check that all ranks were started with the same flags, data, devices and versions.

    Raises:
        UsageError: A rank differs from the root. The message names the rank and the difference.
    """
    device = "cpu" if on_cpu(config.no_cuda) else "cuda"
    mine = same_on_all_ranks(config, source) | versions(source)
    mine |= {"device": device, "optimizer_path": choose_path(torch.device(device))}
    if config.benchmark != "noise":
        mine |= same_run(config, source) | {"val_size": source.val_size}
    gathered = world.all_gather_object(mine, "agreement")
    for rank, theirs in enumerate(gathered):
        for name, value in theirs.items():
            if value != gathered[0][name]:
                raise UsageError(
                    f"rank {rank} has {name} = {value!r}, but rank 0 has {gathered[0][name]!r}"
                )


def check_weights_agree(world: World, model: nn.Module) -> None:
    """Compare a checksum of the weights over the ranks.

    Raises:
        RuntimeError: The weights of some ranks differ from the root's. The message names these ranks.
    """
    checksum = 0
    for parameter in model.parameters():
        values = parameter.detach().cpu().contiguous().flatten()
        checksum = zlib.crc32(values.view(torch.uint8).numpy().tobytes(), checksum)
    gathered = world.all_gather_object(checksum, "weights")
    others = [rank for rank, theirs in enumerate(gathered) if theirs != gathered[0]]
    if others:
        raise RuntimeError(
            f"the weights of ranks {others} differ from those of rank 0 (possibly a fault of memory or network); "
            "run the same command again to resume from the last checkpoint"
        )
