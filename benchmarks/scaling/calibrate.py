"""Measure the parameters of the model on the ranks that the launcher started.

Ranks of one host give the link inside a host. One rank on each of several hosts gives the network, which --machine adds
to the parameters of a host that were measured before. All parameters are measured in rounds, one after the other, so
that a slow moment of the machine affects them alike. The medians over the rounds count.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import socket
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.scaling import machine as machines
from benchmarks.scaling import measure
from benchmarks.scaling.machine import Machine
from benchmarks.scaling.measure import Collective, Passes, Trainer, Unconnected
from benchmarks.scaling.model import FREE, UNSHARED, Cores, Link, expected_maximum
from lars.comm import start
from lars.comm.world import World
from lars.errors import UsageError

# Bytes of the collectives on a CPU, whose buckets have 1 MiB, and on a GPU, whose buckets have 16 MiB.
CPU_SIZES = (1 << 16, 1 << 18, 1 << 20, 4 << 20, 8 << 20)
GPU_SIZES = (1 << 18, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
_WARM_UP = 2
# A step that had this share of a core had it for itself.
_OWN_CORE = 0.97


def main(args: argparse.Namespace) -> None:
    """Measure on all ranks, and write the file on rank 0.

    Raises:
        UsageError: The ranks are not arranged as the model needs it.
    """
    source = _source(args)
    world = start.join(backend=args.backend, on_cpu=not torch.cuda.is_available())
    hosts = world.all_gather_object(socket.gethostname() if not args.host else args.host, "hosts")
    per_host = hosts.count(hosts[0])
    if 1 < per_host < world.size:
        raise UsageError(
            f"--calibrate: {world.size} ranks on {len(set(hosts))} hosts; first measure the ranks of one host, then "
            "add --machine FILE and measure one rank on each host"
        )
    result = measured(args, world, source)
    if world.is_root:
        made = fitted(args, result, world, per_host)
        about: dict[str, Any] = {
            "measured": datetime.datetime.now().isoformat(timespec="seconds"),
            "torch": torch.__version__,
        }
        about |= {
            "host": platform.node(),
            "backend": world.backend,
            "ranks": world.size,
            "load": os.getloadavg()[0],
        }
        machines.save(made, args.calibrate, about=about, **medians(result))
        print(f"wrote {args.calibrate}")
        for line in described(made):
            print(f"  {line}")
        sys.stdout.flush()
    if world.size > 1:
        world.barrier("end of calibration")


def _source(args: argparse.Namespace) -> Any:
    """The images whose loading is measured, or None. Their folder is checked before any time is spent."""
    if not args.train_dir:
        return None
    from data.sources.imagenet import ImageNet

    source = ImageNet(train_dir=args.train_dir, val_dir=args.train_dir)
    source.check()
    source.start_workers(args.workers)
    return source


def measured(args: argparse.Namespace, world: World, source: Any = None) -> dict[str, Any]:
    """Measure in rounds. Every rank calls this at the same point, and rank 0's result counts.

    Returns:
        passes: (batch size, Passes) of each round. steps: (batch size, seconds) of the trainer's step over all ranks.
        collectives: `Collective` of each round. Further values are numbers.
    """
    device = measure.device_of(world)
    sizes = CPU_SIZES if device.type == "cpu" else GPU_SIZES
    local = {b: Trainer(args, b, Unconnected(), device) for b in sorted(set(args.batch_sizes))}
    whole = {b: Trainer(args, b, world, device) for b in local}
    result: dict[str, Any] = {"passes": [], "steps": [], "collectives": []}
    for number in range(_WARM_UP + args.rounds):
        measure.wait_for_turn(args.turns, number)
        passes = [(b, trainer.passes()) for b, trainer in local.items()]
        steps = []
        for b, trainer in whole.items():
            world.barrier("scaling.barrier")
            steps.append((b, measure.timed(trainer.step)))
        found = [measure.collective(world, s, device) for s in sizes] if world.size > 1 else []
        if args.turns:
            world.barrier("scaling.barrier")
        if world.is_root:
            measure.end_turn(args.turns)
        if number == 0:
            result["start"] = measure.seconds_since_start()
        if number >= _WARM_UP:
            result["passes"] += passes
            result["steps"] += steps
            result["collectives"] += found
    first = next(iter(local.values()))
    result["gradients"] = first.gradients()
    result["norms"] = sum(
        isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in first.learner.model.modules()
    )
    result["bucket"] = world.cpu_bucket_bytes if device.type == "cpu" else world.gpu_bucket_bytes
    result["on_cpu"] = device.type == "cpu"
    if world.is_root:
        result["checkpoint"] = measure.checkpoint_seconds(first, args.calibrate.parent)
    if source is not None:
        mine = measure.loader_rate(source, world, max(local), args.workers, args.rounds)
        result["input_rate"] = sum(world.all_gather_object(mine, "rates"))
    return result


def fitted(
    args: argparse.Namespace, result: dict[str, Any], world: World, per_host: int
) -> Machine:
    """The parameters of the model, from the measurements of rank 0."""
    batches = sorted(set(args.batch_sizes))
    by_batch = {b: [p for size, p in result["passes"] if size == b] for b in batches}
    share = statistics.median(p.share for _, p in result["passes"])
    cores = math.inf
    if result["on_cpu"]:
        cores = len(os.sched_getaffinity(0)) / torch.get_num_threads()

    others = max(0.0, cores / share - per_host) if share < _OWN_CORE else 0.0
    link = FREE
    if world.size > 1:
        link = fit_link(result["collectives"], world.size, Cores(cores, per_host, others))
    if args.machine:
        return machines.load(args.machine).replace(network=link)

    def points(part: str) -> tuple[tuple[int, float], ...]:
        """Seconds on a core of its own, by batch size."""
        return tuple(
            (b, statistics.median(getattr(p, part) * p.share for p in by_batch[b])) for b in batches
        )

    return Machine(
        args.name or platform.node(),
        forward=points("forward"),
        backward=points("backward"),
        update=statistics.median(p.update * p.share for _, p in result["passes"]),
        gradients=tuple(result["gradients"]),
        ready=ready_shares(by_batch[batches[-1]]),
        norms=result["norms"],
        per_node=per_host,
        usual_batch=batches[-1],
        bucket=result["bucket"],
        inside=link if per_host > 1 else FREE,
        network=link,
        spread=spread(list(by_batch.values())),
        cores=cores,
        others=others,
        input_rate=result.get("input_rate", math.inf),
        largest_batch=batches[-1],
        checkpoint=result["checkpoint"],
        start=result["start"],
        about=f"measured, {args.model} at {args.image_size} px",
    )


def ready_shares(passes: Sequence[Passes]) -> tuple[float, ...]:
    """When each gradient is complete, as a share of the backward pass: medians over steps."""
    shares = [[seconds / p.backward for seconds in p.complete] for p in passes]
    return tuple(min(1.0, statistics.median(column)) for column in zip(*shares, strict=True))


def spread(groups: Sequence[Sequence[Passes]]) -> tuple[float, ...]:
    """Relative times of steps with the same batch size. Their mean is 1."""
    relative = []
    for group in groups:
        seconds = [p.forward + p.backward for p in group]
        relative += [s / statistics.fmean(seconds) for s in seconds]
    return tuple(sorted(relative))


def fit_link(found: Sequence[Collective], ranks: int, cores: Cores = UNSHARED) -> Link:
    """The link that explains measured allreduces by ring, as medians over rounds.

    The lines are fitted so that the sum of squared relative errors is least. Latencies of collectives that were started
    together may overlap, which gives `in_flight`. `cores` are those that the ranks of a host had: the link is the one
    that enough cores would give.
    """
    sizes = sorted({c.size for c in found})
    rows = {size: [c for c in found if c.size == size] for size in sizes}
    busy = [statistics.median(c.busy for c in rows[size]) for size in sizes]
    speed = [
        cores.speeds(b / statistics.median(c.queued for c in rows[size]), computing=False)[1]
        for b, size in zip(busy, sizes, strict=True)
    ]
    alone = [
        v * statistics.median(c.alone for c in rows[size])
        for v, size in zip(speed, sizes, strict=True)
    ]
    queued = [
        v * statistics.median(c.queued for c in rows[size])
        for v, size in zip(speed, sizes, strict=True)
    ]
    messages, share = 2 * (ranks - 1), 2 * (ranks - 1) / ranks
    gap, per_byte = line(sizes, queued)
    work, work_per_byte = line(sizes, busy)
    wait = max(1e-9, statistics.median(a - per_byte * s for a, s in zip(alone, sizes, strict=True)))
    return Link(
        latency=wait / messages,
        bandwidth=share / per_byte,
        in_flight=min(float(measure.QUEUE), max(1.0, wait / max(gap, 1e-9))),
        cpu_latency=work / messages,
        cpu_per_byte=work_per_byte / share,
    )


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of a line with the least squared relative errors. Neither is negative.

    Example:
        >>> line([1.0, 2.0, 4.0], [3.0, 5.0, 9.0])
        (1.0, 2.0)
    """
    weights = 1 / np.maximum(np.asarray(y), 1e-12)
    columns = np.stack([np.ones(len(x)), np.asarray(x, dtype=float)], axis=1)
    best, _ = _nonnegative(columns * weights[:, None], np.ones(len(x)))
    return float(best[0]), float(best[1])


def _nonnegative(columns: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    """Least squares with two coefficients that are not negative."""
    candidates = [np.linalg.lstsq(columns, target, rcond=None)[0]]
    for kept in (0, 1):
        alone = np.zeros(2)
        alone[kept] = columns[:, kept] @ target / (columns[:, kept] @ columns[:, kept])
        candidates.append(alone)
    allowed = [c for c in candidates if (c >= 0).all()]
    errors = [float(np.square(columns @ c - target).sum()) for c in allowed]
    place = int(np.argmin(errors))
    return allowed[place], errors[place]


def medians(result: dict[str, Any]) -> dict[str, Any]:
    """The medians of measured steps and allreduces, in seconds."""
    steps = {
        str(b): statistics.median(s for size, s in result["steps"] if size == b)
        for b in sorted({b for b, _ in result["steps"]})
    }
    sums = {
        str(size): {
            name: statistics.median(
                getattr(c, name) for c in result["collectives"] if c.size == size
            )
            for name in ("alone", "queued", "busy")
        }
        for size in sorted({c.size for c in result["collectives"]})
    }
    return {"steps": steps, "allreduces": sums}


def described(machine: Machine) -> list[str]:
    """The parameters in words."""
    lines = []
    for (b, forward), (_, backward) in zip(machine.forward, machine.backward, strict=True):
        lines.append(
            f"{b} samples: forward {1000 * forward:.1f} ms, backward {1000 * backward:.1f} ms"
        )
    lines.append(f"optimizer and clearing of gradients: {1000 * machine.update:.1f} ms")
    lines.append(
        f"gradients: {sum(machine.gradients) / 1e6:.1f} MB, buckets of {machine.bucket / 2**20:g} MiB"
    )
    link = machine.network
    if link != FREE:
        lines.append(
            f"link: {link.bandwidth / 1e9:.3g} GB/s, {1e6 * link.latency:.3g} us per message, "
            f"{link.in_flight:.1f} collectives in flight, {1e9 * link.cpu_per_byte:.3g} CPU seconds per GB sent"
        )
    slowest = expected_maximum(machine.spread, 8)
    lines.append(f"slowest of 8 ranks: {100 * (slowest - 1):.1f} % above the mean")
    if machine.cores < math.inf:
        lines.append(f"{machine.cores:g} cores, about {machine.others:.1f} other busy processes")
    lines.append(
        f"checkpoint: {machine.checkpoint:.2f} s; start to the first step: {machine.start:.1f} s"
    )
    return lines
