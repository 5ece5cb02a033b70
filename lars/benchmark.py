"""How fast training steps are, and where their time goes."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from lars.config.config import Config
from lars.config.plan import Plan, make_plan
from lars.expected import IMAGENET_CLASSES, IMAGENET_SIZE
from lars.job.job import Job
from lars.learner import build
from lars.learner.learner import Learner
from lars.learner.task import Batch
from lars.learner.trial import noise, train_sizes
from lars.observe.summary import effective_batch, table

# Steps before the clock starts, in which memory is allocated, algorithms are chosen and caches fill.
WARM_UP = 5
_PHASES = ("data", "compute", "exchange", "optimizer")


def run(config: Config, source: Any, job: Job, workers: int) -> None:
    """Take training steps and print how fast they are. No file is written."""
    job.interrupt.release()  # there is nothing to save, so a signal should end the process at once
    on_noise = config.benchmark == "noise"
    if on_noise:
        source = _Noise(source)
    plan = make_plan(config, size=job.world.size, train_size=source.train_size)
    learner = build.learner(config, plan, source, job.world)
    if on_noise:
        batch = noise(plan.batch_size, source.image_size, IMAGENET_CLASSES)
        batches: Iterator[Batch] = itertools.repeat(batch)
    else:
        loader = source.train_loader(plan.share(job.world.rank, config), workers)
        batches = loader.batches_from(0)
    steps = 50 if config.max_steps is None else config.max_steps
    speed = measure(learner, batches, plan, steps=steps, heartbeat=job.heartbeat)
    if not on_noise:
        loader.close()
    if job.world.is_root:
        what = f"{config.model} on {learner.device.type}, {config.base_op}, amp {config.amp}"
        rows = [
            ("measured", what),
            ("images", f"{first_size(source)} px, {config.benchmark}"),
            ("effective batch", effective_batch(plan)),
            *report(speed, plan),
        ]
        print(table(rows))


def first_size(source: Any) -> int:
    """The side of the training images of the first epoch, in pixels."""
    return train_sizes(source)[0][1]


class _Noise:
    """A source of ImageNet's size that needs no files. Its images have the shape of the first ones of `source`."""

    train_size, num_classes = IMAGENET_SIZE, IMAGENET_CLASSES

    def __init__(self, source: Any) -> None:
        self.image_size, self.mean, self.std = first_size(source), source.mean, source.std


@dataclass
class Speed:
    """The measured times.

    Attributes:
        step_seconds: Time of each step.
        samples: Samples of each step, over all ranks.
        phases: Total time of each phase in seconds, from a second series of the same length. Its steps wait for the
            device between phases.
    """

    step_seconds: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)

    def images_per_second(self) -> tuple[float, float]:
        """The mean speed and half the width of its 95 % confidence interval (normal approximation over the steps)."""
        mean = sum(self.samples) / sum(self.step_seconds)
        if len(self.samples) < 2:
            return mean, math.nan
        per_sample = [t / n for t, n in zip(self.step_seconds, self.samples, strict=True)]
        error = statistics.stdev(per_sample) / math.sqrt(len(per_sample))
        return mean, 1.96 * error * mean**2


def measure(
    learner: Learner,
    batches: Iterator[Batch],
    plan: Plan,
    *,
    steps: int,
    heartbeat: Callable[[str], None],
) -> Speed:
    """Time `steps` steps after a warm-up. Then take as many again to time the phases of a step.

    Args:
        learner: Takes the steps.
        batches: An endless iterator over this rank's micro-batches.
        plan: Gives the micro-batches and samples of each step.
        steps: Number of steps to measure, the same on every rank.
        heartbeat: Called at every step to reset the watchdog.
    """
    speed, watch = Speed(), _Watch(learner.device)
    prepared = learner.prepared(batches)

    def step(number: int, source: Iterator[Batch], *, settle: bool = True) -> int:
        heartbeat(f"step {number + 1} of the benchmark")
        count, samples = plan.micro_batches_in(number), plan.samples_in(number)
        learner.launch(source, number, count=count, samples=samples, settle=settle)
        return samples

    began = time.perf_counter()
    for number in range(WARM_UP + steps):
        # As in training, the host may work ahead of a GPU. It waits before the first measured step and after the last.
        samples = step(number, prepared, settle=number + 1 in (WARM_UP, WARM_UP + steps))
        ended = time.perf_counter()
        if number >= WARM_UP:
            speed.step_seconds.append(ended - began)
            speed.samples.append(samples)
        began = ended

    finish = learner.gradients.finish_exchange

    def finish_exchange() -> None:
        watch.lap("compute")
        finish()
        watch.lap("exchange")

    def split() -> Iterator[Batch]:
        while True:
            watch.lap("compute")
            batch = next(prepared)
            watch.lap("data")
            yield batch

    learner.gradients.finish_exchange = finish_exchange  # type: ignore[method-assign]
    watched = split()
    watch.lap("")
    for number in range(WARM_UP + steps, WARM_UP + 2 * steps):
        step(number, watched)
        watch.lap("optimizer")
    learner.gradients.finish_exchange = finish  # type: ignore[method-assign]
    speed.phases = {name: watch.seconds[name] for name in _PHASES}
    return speed


def report(speed: Speed, plan: Plan) -> list[tuple[str, str]]:
    """Format the measurement as rows of a table."""
    mean, half_width = speed.images_per_second()
    steps = len(speed.step_seconds)
    spread = f" ± {half_width:.1f} (95 % of {steps} steps)" if steps > 1 else ""
    total = sum(speed.phases.values())
    shares = ", ".join(f"{name} {t / total:.1%}" for name, t in speed.phases.items())
    return [
        ("images/s", f"{mean:.1f}{spread}"),
        ("per rank", f"{mean / plan.size:.1f}"),
        ("time per step", f"{1000 * statistics.median(speed.step_seconds):.1f} ms (median)"),
        ("of which", f"{shares} (exchange: the part that backward does not hide)"),
    ]


class _Watch:
    """A stopwatch that adds up the time of named laps. Each lap waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.since = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to `name`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now
