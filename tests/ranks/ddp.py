"""One of two ranks of torchrun: the optimizers in torch's DistributedDataParallel, and their distributed state.

Started by tests/optim/test_optim_ddp.py. The root prints a report as JSON.
"""

import copy
import json
from typing import Any

import torch
import torch.distributed as dist
from sharded import BUILDS, error, network
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


def samples(step: int) -> Tensor:
    """Eight samples per step, the same on all ranks."""
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(step))


def train(
    model: nn.Module, optimizer: Optimizer, steps: range, rank: int = 0, size: int = 1
) -> list[Tensor]:
    """Train on the share of a rank, and return the parameters."""
    for step in steps:
        optimizer.zero_grad()
        model(samples(step).chunk(size)[rank]).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def main() -> None:
    """Compare with a single process, and move the state of each optimizer into a new one."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    report: dict[str, Any] = {"ddp": {}, "state": {}}
    for name, build in BUILDS.items():
        alone = network()
        want = train(alone, build(alone.parameters()), range(4))
        model = DistributedDataParallel(network())
        optimizer = build(model.parameters())
        train(model, optimizer, range(2), rank, size)

        other = DistributedDataParallel(network())
        other.load_state_dict(model.state_dict())
        resumed = build(other.parameters())
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))  # it shares memory
        assert "module.0.weight" not in state["state"], "names without DDP's prefix"
        set_optimizer_state_dict(other, resumed, state)

        rest = range(2, 4)
        whole = train(model, optimizer, rest, rank, size)
        report["ddp"][name] = error(whole, want)
        report["state"][name] = error(train(other, resumed, rest, rank, size), whole)
    if rank == 0:
        print(json.dumps(report), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
