"""The trainer's step, as several parts measure it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from lars.comm.world import World
from lars.config import Config
from lars.config.plan import make_plan
from lars.learner.build import build_model, make_learner
from lars.learner.classification import Classification
from lars.learner.device import pick_device
from lars.learner.learner import Learner
from lars.learner.trial import noise

CLASSES = 1000


class Setting(NamedTuple):
    """One way to train. The defaults are those for a GPU."""

    amp: str = "bf16"
    channels_last: bool = True
    compile: bool = False
    batch_size: int = 256
    model: str = "resnet50"
    image_size: int = 224

    def __str__(self) -> str:
        """The setting in words."""
        layout = "channels-last" if self.channels_last else "channels-first"
        amp = "fp32" if self.amp == "off" else self.amp
        network = f"{self.model} {self.image_size} px"
        words = [
            network,
            amp,
            layout,
            *(["compiled"] if self.compile else []),
            f"batch {self.batch_size}",
        ]
        return ", ".join(words)


# On CPUs, a small network on small images shows that everything works.
ON_CPU = Setting(amp="off", batch_size=16, model="resnet18", image_size=64)


def usual_setting() -> Setting:
    """The setting that fits the machine."""
    return Setting() if torch.cuda.is_available() else ON_CPU


def device_of(world: World) -> torch.device:
    """The device of this rank, as in the trainer."""
    return pick_device(not torch.cuda.is_available(), world)


def make(setting: Setting, world: World, device: torch.device) -> Learner:
    """Build a learner with LARS and random weights, equal on all ranks."""
    config = Config(
        model=setting.model,
        batch_size=setting.batch_size,
        base_op="lars",
        amp=setting.amp,
        channels_last=setting.channels_last,
        compile=setting.compile,
    )
    plan = make_plan(config, size=world.size, train_size=world.size * setting.batch_size)
    task = Classification(mean=(127.5,) * 3, std=(64.0,) * 3, channels_last=setting.channels_last)
    return make_learner(config, plan, task, build_model(config, CLASSES), world, device)


def resident(learner: Learner, setting: Setting) -> Iterator[Any]:
    """The same batch of noise without end. It is on the device already."""
    batch = noise(setting.batch_size, setting.image_size, CLASSES)
    return itertools.repeat(next(learner.prepared([batch])))


def step_seconds(
    learner: Learner,
    batches: Iterator[Any],
    samples: int,
    *,
    steps: int,
    enough: Callable[[], bool] = lambda: False,
    warm_up: int = 3,
) -> float:
    """Mean time of a step. The host works ahead of the device, as in training.

    Args:
        learner: Takes the steps.
        batches: Prepared batches. One is taken for each step.
        samples: Samples of a step over all ranks.
        steps: Number of steps to measure.
        enough: Asked after each step; True ends the measurement. It must be the same on all ranks.
        warm_up: Steps before the measurement.
    """
    for _ in range(warm_up):
        learner.launch(batches, 0, count=1, samples=samples)
    wait(learner.device)
    began, taken = time.perf_counter(), 0
    while taken < steps and not (taken and enough()):
        learner.launch(batches, 0, count=1, samples=samples, settle=False)
        taken += 1
    wait(learner.device)
    seconds = (time.perf_counter() - began) / taken
    learner.launch(batches, 0, count=1, samples=samples, settle=True)
    return seconds


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
