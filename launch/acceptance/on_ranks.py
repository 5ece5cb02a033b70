"""What the ranks of a job do together. The part "ranks" starts it as a command on each of them."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict

import torch

from lars import launcher
from lars.comm import start
from lars.comm.world import World
from lars.errors import UsageError
from launch.acceptance import training
from launch.acceptance.parts import doctor
from launch.acceptance.rows import Row, failed, measured, not_tested

_MEBI = 1 << 20
_REPEATS = 5


def rows(backend: str, *, with_doctor: bool) -> Iterator[Row]:
    """Join the other ranks and measure. Every rank calls this at the same point; the rows of the root count."""
    on_gpu = torch.cuda.is_available()
    try:
        world = start.join(backend=backend, on_cpu=not on_gpu)
    except UsageError as error:
        yield not_tested(backend, str(error))
        return
    try:
        device = training.device_of(world)
    except UsageError:  # on all ranks alike: there are fewer GPUs than ranks
        device = torch.device("cpu")
    where = f"{world.backend}, {world.size} ranks on {device.type}"
    if with_doctor:
        yield from doctor.rows_of(world)
    sizes = (1, 25, 100) if device.type == "cuda" else (1, 25)
    for mebi in sizes:
        yield allreduce(world, mebi, device, f"allreduce of {mebi} MiB, {where}")
    yield step(world, device, where)


def allreduce(world: World, mebi: int, device: torch.device, what: str) -> Row:
    """Sum a tensor over the ranks. Each link of a ring carries 2 (n - 1) / n of its bytes: the bus bandwidth."""
    times, correct = [], True
    for number in range(_REPEATS + 1):
        values = torch.full((mebi * _MEBI // 4,), world.rank + 1.0, device=device)
        training.wait(device)
        world.barrier(f"acceptance.barrier.{mebi}.{number}")
        began = time.perf_counter()
        world.finish(world.start_sum(values, f"acceptance.{mebi}.{number}"))
        training.wait(device)
        times.append(time.perf_counter() - began)
        correct &= bool((values == world.size * (world.size + 1) / 2).all())
    if not all(world.all_gather_object(correct, f"acceptance.correct.{mebi}")):
        return failed(what, "the sum is wrong; python -m launch.doctor on the same ranks")
    seconds = statistics.median(times[1:])
    bus = 2 * (world.size - 1) / world.size * mebi * _MEBI / seconds / 1e9
    return measured(what, bus, "GB/s (bus)", note=f"{1000 * seconds:.2f} ms")


def step(world: World, device: torch.device, where: str) -> Row:
    """The speed of a training step over all ranks, compared with that of one rank while all work alone."""
    setting = training.usual_setting() if device.type == "cuda" else training.ON_CPU
    steps, warm_up = (30, 5) if device.type == "cuda" else (3, 1)
    rates = []
    for each in (World(), world):
        learner = training.make(setting, each, device)
        batches = training.resident(learner, setting)
        world.barrier(f"acceptance.step.{each.size}")
        samples = each.size * setting.batch_size
        seconds = training.step_seconds(learner, batches, samples, steps=steps, warm_up=warm_up)
        rates.append(setting.batch_size / seconds)
    alone, together = rates
    note = f"{together:.1f} on each rank, {together / alone:.0%} of ranks without an exchange"
    return measured(f"{setting}, {where}", world.size * together, "images/s", note=note)


def main() -> None:
    """Measure with each backend, and write the rows of the root as lines of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="the root adds a line of JSON for each row to this file")
    parser.add_argument(
        "backends", nargs="+", help="the backends, in the order in which to use them"
    )
    parser.add_argument("--doctor", action="store_true", help="begin with the checks of the doctor")
    options = parser.parse_args()
    is_root = launcher.rank() == 0
    for number, backend in enumerate(options.backends):
        for row in rows(backend, with_doctor=options.doctor and number == 0):
            if is_root:
                with open(options.file, "a") as file:
                    print(json.dumps(asdict(row)), file=file)


if __name__ == "__main__":
    main()
