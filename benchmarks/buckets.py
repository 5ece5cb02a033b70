"""Compare sizes of gradient buckets: the exchange alone, and the backward pass that overlaps with it.

    launch/mpirun.sh -np 2 -m benchmarks.buckets
    torchrun --standalone --nproc-per-node 2 -m benchmarks.buckets
    horovodrun --gloo -np 2 python -m benchmarks.buckets

Each round measures every size once, on CPUs. The table shows medians of the times, and of the ratios to the first size
in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lars.comm import start
from lars.comm.gradients import ExchangedGradients
from lars.comm.world import World
from lars.learner.device import keep_freed_memory
from lars.models import build


def candidates(args: argparse.Namespace, world: World, mib: int) -> dict[str, Callable[[], None]]:
    """The two things that are timed, with buckets of `mib` MiB: the exchange, and a forward and backward pass."""
    model = build(args.model, 1000).to(memory_format=torch.channels_last).train()
    world.cpu_bucket_bytes = mib << 20
    gradients = ExchangedGradients(model.parameters(), world)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (args.batch_size,))

    def exchange() -> None:
        gradients.begin_exchange()
        gradients.finish_exchange()

    def training() -> None:
        gradients.zero()
        gradients.begin_exchange()
        nn.functional.cross_entropy(model(images), labels).backward()
        gradients.finish_exchange()

    return {"exchange": exchange, "forward and backward": training}


def main() -> None:
    """Read the flags, measure, and print the table on the root."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mib", type=int, nargs="+", default=[1, 4, 16, 64], help="sizes in MiB (1 4 16 64)"
    )
    parser.add_argument("--rounds", type=int, default=6, help="timed rounds (6)")
    parser.add_argument("--model", default="resnet50", help="network (resnet50)")
    parser.add_argument("--image-size", type=int, default=128, help="side of the images (128)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples per rank (16)")
    args = parser.parse_args()
    keep_freed_memory()
    world = start.join(on_cpu=True)
    timed = {mib: candidates(args, world, mib) for mib in args.mib}
    for what in timed[args.mib[0]]:
        seconds: dict[int, list[float]] = {mib: [] for mib in args.mib}
        for turn in range(args.rounds + 1):
            for mib in args.mib:
                world.barrier("round")
                began = time.perf_counter()
                timed[mib][what]()
                if turn:  # the first one is the warm-up
                    seconds[mib].append(time.perf_counter() - began)
        for mib in args.mib if world.is_root else ():
            ratios = [a / b for a, b in zip(seconds[mib], seconds[args.mib[0]], strict=True)]
            print(
                f"{what}, {mib} MiB: {1000 * statistics.median(seconds[mib]):.0f} ms, "
                f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
