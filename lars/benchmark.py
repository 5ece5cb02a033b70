"""How fast training steps are, and what their time goes into."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from lars.learner import Batch, Learner
from lars.metrics import Sums
from lars.plan import Plan

# Steps before the clock starts: memory is taken, algorithms are chosen, caches fill.
WARM_UP = 5
_PHASES = ("data", "compute", "exchange", "optimizer")


@dataclass
class Speed:
    """What was measured.

    Attributes:
        step_seconds: Of each step.
        samples: Of each step, over all ranks.
        phases: Seconds that went into each phase of as many steps again, run with a stop of the device between phases.
    """

    step_seconds: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)

    def images_per_second(self) -> tuple[float, float]:
        """The mean speed, and half the width of its 95 % confidence interval (normal, over the steps)."""
        mean = sum(self.samples) / sum(self.step_seconds)
        if len(self.samples) < 2:
            return mean, math.nan
        per_sample = [t / n for t, n in zip(self.step_seconds, self.samples, strict=True)]
        error = statistics.stdev(per_sample) / math.sqrt(len(per_sample))
        return mean, 1.96 * error * mean**2


def noise(samples: int, side: int, classes: int) -> Batch:
    """A batch of uint8 images (samples, 3, side, side) and labels, as a loader gives them."""
    generator = torch.Generator().manual_seed(0)
    shape = (samples, 3, side, side)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return images, torch.randint(classes, (samples,), generator=generator)


def measure(
    learner: Learner,
    batches: Iterator[Batch],
    to_device: Callable[[Batch], Batch],
    plan: Plan,
    *,
    steps: int,
    beat: Callable[[str], None],
) -> Speed:
    """Take `steps` steps after a warm-up, and as many again for the split into phases.

    Args:
        learner: Takes the steps.
        batches: This rank's micro-batches, without end.
        to_device: What the trainer does to each.
        plan: Micro-batches and samples of a step.
        steps: To measure, on every rank alike.
        beat: Told of every step, as the watchdog wants it.
    """
    learner.model.train()
    speed, watch = Speed(), _Watch(learner.device)
    on_device = map(to_device, batches)

    def step(number: int, source: Iterator[Batch]) -> int:
        beat(f"step {number + 1} of the benchmark")
        k = number % plan.steps_per_epoch
        count, samples = plan.micro_batches_in_step(k), plan.samples_in_step(k)
        micro_batches = (next(source) for _ in range(count))
        sums = Sums(learner.device)
        learner.step(micro_batches, step=number, count=count, samples=samples, sums=sums)
        return samples

    for number in range(WARM_UP + steps):
        watch.lap("")
        samples = step(number, on_device)
        watch.lap("step")
        if number >= WARM_UP:
            speed.step_seconds.append(watch.last)
            speed.samples.append(samples)

    finish = learner.gradients.finish_exchange

    def finish_exchange() -> None:
        watch.lap("compute")
        finish()
        watch.lap("exchange")

    def split() -> Iterator[Batch]:
        while True:
            watch.lap("compute")
            batch = next(on_device)
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
    """The measurement as rows of a table."""
    mean, half_width = speed.images_per_second()
    steps = len(speed.step_seconds)
    spread = f" ± {half_width:.1f} (95 % of {steps} steps)" if steps > 1 else ""
    whole = sum(speed.phases.values())
    shares = ", ".join(f"{name} {t / whole:.1%}" for name, t in speed.phases.items())
    return [
        ("images/s", f"{mean:.1f}{spread}"),
        ("per rank", f"{mean / plan.size:.1f}"),
        ("a step", f"{1000 * statistics.median(speed.step_seconds):.1f} ms (median)"),
        ("of which", f"{shares} (exchange: what backward does not hide)"),
    ]


class _Watch:
    """Adds up the time between laps, each waited for on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.since = time.perf_counter()
        self.last = 0.0

    def lap(self, name: str) -> None:
        """The time since the last lap went into `name`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.last = now - self.since
        self.seconds[name] = self.seconds.get(name, 0.0) + self.last
        self.since = now
