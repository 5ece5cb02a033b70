"""Suites with several processes: the exchange between two ranks, and how long jobs need to start.

The launchers run this file as ``python -m benchmarks.suites.ranks`` on each rank.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import buckets, loader
from benchmarks.processes import TORCHRUN, finish, mpirun
from benchmarks.rounds import Comparison, Row, Suite, alone, in_turn, missing, timed

MPI, GLOO = "Horovod over MPI", "torch.distributed over Gloo"
OURS, EACH = "exchange: trainer's buckets", "exchange: one allreduce per tensor"
TRAINING, PEER = "forward and backward: trainer", "forward and backward: {}"
PEERS = {"torch": "DistributedDataParallel", "horovod": "DistributedOptimizer, not channels-last"}


# ------------------------------------------------------------------------------------- on the ranks


def measure_here() -> None:
    """Measure on this rank. The root prints the values of every round as JSON."""
    from lars.comm import start
    from lars.learner.device import keep_freed_memory

    parser = argparse.ArgumentParser()
    parser.add_argument("backend", choices=("torch", "horovod"))
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    keep_freed_memory()
    world = start.join(on_cpu=True)
    ours = buckets.candidates(args, world, 1)
    peers = {"torch": with_torch, "horovod": with_horovod}[args.backend](args)
    run = {OURS: ours["exchange"], TRAINING: ours["forward and backward"], **peers}

    def after_barrier(measure: Callable[[], float]) -> float:
        world.barrier("turn")
        return measure()

    turns = [alone(name, functools.partial(after_barrier, timed(e))) for name, e in run.items()]
    found = in_turn(turns, args.rounds)
    if world.is_root:
        print("\n" + json.dumps(found), flush=True)


def network_and_batch(
    args: argparse.Namespace, layout: torch.memory_format
) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, the images and the labels of the peers."""
    from lars.models import build

    model = build(args.model, 1000).to(memory_format=layout).train()  # type: ignore[call-overload]
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    return model, images.contiguous(memory_format=layout), torch.randint(1000, (args.batch_size,))


def with_torch(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """torch.distributed alone, and DistributedDataParallel."""
    import torch.distributed as dist

    model, images, labels = network_and_batch(args, torch.channels_last)
    tensors = [torch.zeros_like(p) for p in model.parameters()]
    wrapped = nn.parallel.DistributedDataParallel(model)

    def each() -> None:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()

    def step() -> None:
        wrapped.zero_grad()
        nn.functional.cross_entropy(wrapped(images), labels).backward()

    return {EACH: each, PEER.format(PEERS["torch"]): step}


def with_horovod(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Horovod alone, and its DistributedOptimizer. Horovod refuses gradients in channels-last."""
    import horovod.torch as hvd

    model, images, labels = network_and_batch(args, torch.contiguous_format)
    tensors = [torch.zeros_like(p) for p in model.parameters()]
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = hvd.DistributedOptimizer(sgd, named_parameters=model.named_parameters())

    def each() -> None:
        for handle in [hvd.allreduce_async_(t, name=f"t{i}") for i, t in enumerate(tensors)]:
            hvd.synchronize(handle)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.synchronize()

    return {EACH: each, PEER.format(PEERS["horovod"]): step}


# -------------------------------------------------------------------------------------- the suites


@contextlib.contextmanager
def exchange(folder: Path, options: argparse.Namespace) -> Iterator[Comparison]:
    """Two ranks of each backend."""
    module = ["-m", "benchmarks.suites.ranks"]
    commands = {GLOO: [*TORCHRUN, "2", *module, "torch"], MPI: [*mpirun(2), *module, "horovod"]}
    lacks = {GLOO: "", MPI: lacks_mpi()}
    peers = {GLOO: PEERS["torch"], MPI: PEERS["horovod"]}
    rows = []
    for backend, peer in peers.items():
        for name, against in ((OURS, EACH), (EACH, EACH), (TRAINING, PEER), (PEER, PEER)):
            own, other = (f"{each.format(peer)} ({backend})" for each in (name, against))
            rows.append(Row(own, other, lacks[backend]))
    turns = [functools.partial(job, commands[b], b) for b in peers if not lacks[b]]
    yield Comparison(rows, turns)


def lacks_mpi() -> str:
    """What Horovod's ranks need and is not installed. Empty if nothing is missing."""
    return "" if mpirun(2) else missing("horovod") or "mpirun"


def job(command: list[str], backend: str) -> dict[str, float]:
    """Run a job, and return the medians of its rounds."""
    found = json.loads(finish(command).strip().splitlines()[-1])
    return {f"{name} ({backend})": statistics.median(v) for name, v in found.items()}


@contextlib.contextmanager
def start_up(folder: Path, options: argparse.Namespace) -> Iterator[Comparison]:
    """Jobs that take a few steps of a tiny network on noise, and the parts that no trainer can avoid."""
    python = [sys.executable]
    tiny = ["--model=resnet18", "--image-size=64", "--batch-size=2"]
    train = ["train_imagenet.py", *tiny, "--no-cuda", "--benchmark=noise", "--max-steps=1"]
    check = ["launch/install/check_allreduce.py"]
    imports, torch_pair, mpi_pair = (
        "import torch, torchvision", "2 ranks join: torchrun", "2 ranks join: mpirun",
    )  # fmt: skip
    commands = {
        imports: ([*python, "-c", imports], imports),
        "import timm": ([*python, "-c", "import timm"], imports),
        "train_imagenet.py --help": ([*python, "train_imagenet.py", "--help"], imports),
        "train_imagenet.py, 7 steps": ([*python, *train], imports),
        torch_pair: ([*TORCHRUN, "2", *check, "torch"], torch_pair),
        "train_imagenet.py, 2 ranks, torchrun": ([*TORCHRUN, "2", *train], torch_pair),
        mpi_pair: ([*mpirun(2), *check], mpi_pair),
        "train_imagenet.py, 2 ranks, mpirun": ([*mpirun(2), *train], mpi_pair),
    }
    lacks = {name: lacks_mpi() for name in commands if "mpirun" in name}
    lacks["import timm"] = missing("timm")
    rows = [Row(name, other, lacks.get(name, "")) for name, (_, other) in commands.items()]
    turns = [
        alone(row.name, timed(functools.partial(finish, commands[row.name][0]), 1))
        for row in rows
        if not row.lacks
    ]
    for method in ("spawn", "forkserver"):
        name = f"first batch of 2 workers, {method}"
        rows.append(Row(name, "first batch of 2 workers, spawn"))
        turns.append(alone(name, timed(functools.partial(loader.first_batch, method, 2), 1)))
    yield Comparison(rows, turns)


SUITES = (
    Suite(
        "exchange",
        "Exchange between two ranks",
        "The gradients of ResNet-50, and a forward and backward pass with 8 images of 64 px per rank that overlaps "
        "with the exchange. Horovod has the trainer's settings in all of its rows. DistributedOptimizer refuses "
        "channels-last gradients, so its row also shows the cost of the other layout. "
        "`python -m benchmarks.buckets` compares sizes of buckets.",
        "ms",
        exchange,
        warm_up=False,
    ),
    Suite(
        "start",
        "Start-up",
        "Seconds from the launch of a process to its end. The trainer takes 7 steps of a tiny network on noise. The "
        "trainer starts its workers with forkserver.",
        "s",
        start_up,
        warm_up=False,
    ),
)


if __name__ == "__main__":
    measure_here()
