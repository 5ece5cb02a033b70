"""What all ranks must have in common."""

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
    """Refuse to train if the ranks were not started alike.

    Raises:
        UsageError: A rank has other flags, data, devices or versions than the root; the message names it, and what
            differs.
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
        RuntimeError: A rank's weights differ from the root's; the message names it.
    """
    checksum = 0
    for parameter in model.parameters():
        values = parameter.detach().cpu().contiguous().flatten()
        checksum = zlib.crc32(values.view(torch.uint8).numpy().tobytes(), checksum)
    gathered = world.all_gather_object(checksum, "weights")
    others = [rank for rank, theirs in enumerate(gathered) if theirs != gathered[0]]
    if others:
        raise RuntimeError(
            f"the weights of ranks {others} differ from those of rank 0 (a fault of memory or network?); "
            "the last checkpoint is unchanged"
        )
