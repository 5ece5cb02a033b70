"""Predictions: how fast a job trains on a number of hosts, what it costs, and what limits it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.scaling.machine import Machine
from benchmarks.scaling.model import (
    Cores,
    Cost,
    allreduce,
    buckets,
    expected_maximum,
    hierarchical,
    interpolate,
    overlap,
)
from lars.expected import IMAGENET_SIZE

VALIDATION_IMAGES = 50_000
# A limit is reported if the step would be shorter by at least this share without it.
_WORTH = 0.02


class Job(NamedTuple):
    """What to predict.

    Attributes:
        nodes: Hosts.
        per_node: Ranks (GPUs) of each host.
        batch: Samples of a step over all ranks.
        bn_ranks: Ranks over which BatchNorm takes its statistics. All of them: --sync-bn.
        algorithm: The algorithm of the exchange between hosts: ring, tree, or auto for the faster one.
    """

    nodes: int
    per_node: int
    batch: int
    bn_ranks: int = 1
    algorithm: str = "auto"

    @property
    def ranks(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Step:
    """The predicted time of a step and of its parts, in seconds.

    Attributes:
        job: The job whose step this is.
        step: Time of a step, which is the sum of the following parts.
        forward_backward: The passes of the slowest rank, without any exchange.
        exposed: The part of the exchange that the backward pass does not hide.
        waiting: Waiting for images.
        update: The optimizer.
        statistics: The exchange of BatchNorm's statistics.
    """

    job: Job
    step: float
    forward_backward: float
    exposed: float
    waiting: float
    update: float
    statistics: float

    @property
    def rate(self) -> float:
        """Images per second of all ranks."""
        return self.job.batch / self.step


@dataclass(frozen=True)
class Training:
    """The predicted time of a training run.

    Attributes:
        epoch: Seconds of an epoch, without validation.
        validation: Seconds of a validation.
        minutes: Minutes of the whole run, with start, validations and checkpoints.
        gpu_hours: Hours of the run times the number of ranks.
    """

    epoch: float
    validation: float
    minutes: float
    gpu_hours: float


def predict(machine: Machine, job: Job) -> Step:
    """Predict the time of a step."""
    local = math.ceil(job.batch / job.ranks)
    passes = math.ceil(local / machine.largest_batch)
    micro = local / passes
    cores = Cores(machine.cores, job.per_node, machine.others)
    slow = 1 / cores.speeds(0.0)[0]
    slowest = expected_maximum(machine.spread, job.ranks) / expected_maximum(machine.spread, 1)
    forward = slowest * interpolate(micro, machine.forward)
    backward = slowest * interpolate(micro, machine.backward)
    compute = passes * (forward + backward) * slow
    exposed = 0.0
    if job.ranks > 1:
        sizes, ready = buckets(machine.gradients, machine.ready, machine.bucket)
        costs = [exchange(machine, job, machine.sent * size) for size in sizes]
        exposed = overlap(backward, ready, costs, cores) - backward * slow
    statistics = 2 * passes * machine.norms * statistics_exchange(machine, job)
    busy = compute + exposed + machine.update * slow + statistics
    waiting = max(0.0, local * job.per_node / machine.input_rate - busy)
    return Step(job, busy + waiting, compute, exposed, waiting, machine.update * slow, statistics)


def exchange(machine: Machine, job: Job, size: float) -> Cost:
    """The cost of the exchange of one bucket."""
    return hierarchical(
        job.nodes, job.per_node, size, machine.inside, machine.network, job.algorithm
    )


def statistics_exchange(machine: Machine, job: Job) -> float:
    """The time in which the ranks of a group exchange the statistics of one BatchNorm layer, a few kilobytes."""
    per_node = min(job.bn_ranks, job.per_node)
    nodes = math.ceil(job.bn_ranks / per_node)
    if nodes == 1:
        return allreduce(per_node, 4096, machine.inside).alone
    return hierarchical(nodes, per_node, 4096, machine.inside, machine.network).alone


def training(machine: Machine, step: Step, epochs: float, images: int = IMAGENET_SIZE,
             validate_every: float = 1.0) -> Training:  # fmt: skip
    """Predict the time of a run. After every `validate_every` epochs it validates and writes a checkpoint."""
    epoch = math.ceil(images / step.job.batch) * step.step
    ranks = step.job.ranks
    rows = math.ceil(VALIDATION_IMAGES / ranks)
    micro = min(rows, machine.largest_batch)
    validation = rows / micro * interpolate(micro, machine.forward) + machine.validation_fixed
    pauses = math.ceil(epochs / validate_every) * (validation + machine.checkpoint)
    seconds = machine.start + epochs * epoch + pauses
    return Training(epoch, validation, seconds / 60, seconds / 3600 * ranks)


@dataclass(frozen=True)
class Limit:
    """Something that makes a step longer than it could be.

    Attributes:
        name: What it is.
        share: Share of the step that would be saved without it.
        help: What would help.
    """

    name: str
    share: float
    help: str


def limits(machine: Machine, step: Step) -> list[Limit]:
    """What makes this step longer than perfect scaling, in falling order of the time that it costs."""
    several = step.job.nodes > 1
    link = "network" if several else "inside"
    where = "network" if several else "links inside a host"
    fast = getattr(machine, link)
    largest = min(machine.largest_batch, machine.forward[-1][0])
    ideal = {
        f"bandwidth of the {where}": (
            machine.replace(**{link: fast._replace(bandwidth=math.inf)}),
            "16-bit gradients (--fp16-allreduce, --bf16-allreduce), a faster network, or a larger batch",
        ),
        f"latency of the {where}": (
            machine.replace(**{link: fast._replace(latency=0.0, launch=0.0)}),
            "larger buckets, a network with lower latency, or a larger batch",
        ),
        "CPU time of the exchange": (
            machine.replace(
                inside=machine.inside._replace(cpu_latency=0.0, cpu_per_byte=0.0),
                network=machine.network._replace(cpu_latency=0.0, cpu_per_byte=0.0),
            ),
            "more cores per rank, or a larger batch",
        ),
        "BatchNorm's statistics over several ranks": (
            machine.replace(norms=0),
            "statistics of fewer ranks (no --sync-bn), or a larger batch per rank",
        ),
        "slow ranks": (
            machine.replace(spread=(1.0,)),
            "equal hosts, fewer other programs on them, pinned cores",
        ),
        "loading of images": (
            machine.replace(input_rate=math.inf),
            "more --workers, smaller images (data.make_tfrecords --short-side), or DALI",
        ),
        "CPU cores shared by ranks": (
            machine.replace(cores=math.inf, others=0.0),
            "fewer ranks per host, more cores, or no other programs on them",
        ),
        "small batch per rank": (
            machine.replace(
                forward=_through_origin(machine.forward, largest),
                backward=_through_origin(machine.backward, largest),
            ),
            "a larger batch, or fewer ranks",
        ),
    }
    found = [
        Limit(name, 1 - predict(other, step.job).step / step.step, text)
        for name, (other, text) in ideal.items()
    ]
    return sorted((f for f in found if f.share >= _WORTH), key=lambda f: -f.share)


def _through_origin(
    points: tuple[tuple[float, float], ...], largest: float
) -> tuple[tuple[float, float], ...]:
    """Passes that take the same time per image at every batch size as at the largest one."""
    return ((largest, interpolate(largest, points)),)
