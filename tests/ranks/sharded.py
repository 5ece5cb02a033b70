"""One of two ranks: the optimizers on sharded parameters. Started by tests/optim/test_optim_sharded.py."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.optim import SGD, AdamW, Optimizer

from lars import LAMB, LARS, TVLARS, LARSWrapper

OPTIONS: dict[str, Any] = {"lr": 0.1, "weight_decay": 1e-2}
BUILDS: dict[str, Callable[[Any], Optimizer]] = {
    "LARS": lambda p: LARS(p, momentum=0.9, **OPTIONS),
    "LARS optax": lambda p: LARS(p, momentum=0.9, form="optax", nonfinite="skip", **OPTIONS),
    "LARS foreach": lambda p: LARS(p, momentum=0.9, path="foreach", **OPTIONS),
    "LAMB": lambda p: LAMB(p, **OPTIONS),
    "LAMB paper": lambda p: LAMB(p, form="paper", **OPTIONS),
    "TVLARS": lambda p: TVLARS(p, **OPTIONS),
    "LARSWrapper SGD": lambda p: LARSWrapper(SGD(p, momentum=0.9, **OPTIONS)),
    "LARSWrapper AdamW": lambda p: LARSWrapper(AdamW(p, **OPTIONS)),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))


def trained(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """The whole parameters after three steps; all ranks see the same samples."""
    torch.manual_seed(1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach() for p in whole]


def error(one: list[Tensor], other: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def refusal(build: Callable[[Any], Optimizer], use_orig_params: bool) -> str:
    """The message for a model in the older FullyShardedDataParallel, or an empty string."""
    model = FullyShardedDataParallel(
        network(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    try:
        build(model.parameters())
    except ValueError as message:
        return str(message)
    return ""


def main() -> None:
    meeting_point, rank = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    report: dict[str, Any] = {"fully_shard": {}, "tensor parallel": {}, "zero": {}, "refused": []}
    for name, build in BUILDS.items():
        plain = network()
        want = trained(plain, build(plain.parameters()))

        model = network()
        for layer in (model[0], model[1], model[3], model):
            fully_shard(layer, mesh=mesh)
        report["fully_shard"][name] = error(trained(model, build(model.parameters())), want)

        model = network()  # its LayerNorm is not distributed
        plan = {key: ColwiseParallel(output_layouts=Replicate()) for key in ("0", "3")}
        parallelize_module(model, mesh, plan)
        report["tensor parallel"][name] = error(trained(model, build(model.parameters())), want)

        report["refused"] += [refusal(build, use_orig_params) for use_orig_params in (False, True)]
    for bound in (None, 0.01):
        plain, model = network(), network()
        want = trained(plain, LAMB(plain.parameters(), max_grad_norm=bound, **OPTIONS))
        zero = ZeroRedundancyOptimizer(model.parameters(), LAMB, max_grad_norm=bound, **OPTIONS)
        report["zero"][str(bound)] = error(trained(model, zero), want)
    if rank == 0:
        print(json.dumps(report), flush=True)
    dist.barrier()
    os._exit(0)  # threads of torch.distributed sometimes abort a normal exit


if __name__ == "__main__":
    main()
