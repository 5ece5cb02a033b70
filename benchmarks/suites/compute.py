"""Suites in one process: the optimizer's step, the training step, validation, and the cost of observers."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks import optimizer, training
from benchmarks.observing import observed_steps
from benchmarks.rounds import Comparison, Row, Suite, Turn, alone, missing, speed, timed
from lars.names import LAMB_FORMS, LARS_FORMS

SHAPE = argparse.Namespace(model="resnet50", image_size=64, batch_size=16)
BARE = "bare loop, torch SGD fused"
CLOCK = time.process_time  # there is one thread, and other programs hardly disturb its CPU time
# Other forms and slow paths, which `benchmarks.optimizer` measures.
LEFT_OUT = (
    "LARS path",
    *(f"LARS {form}" for form in list(LARS_FORMS)[1:]),
    *(f"LAMB {form}" for form in list(LAMB_FORMS)[1:]),
)


@contextlib.contextmanager
def optimizers(folder: Path, options: argparse.Namespace) -> Iterator[Comparison]:
    """A step on the parameters of ResNet-50: candidates of packages, and the default forms of the trainer's."""
    every = [c for c in optimizer.candidates() if not c.name.startswith(LEFT_OUT)]
    every = [c for c in every if "(restated)" not in c.name]
    rows = [Row(c.name, c.baseline, "" if c.build else missing(c.name.split()[1])) for c in every]
    shapes, cpu = optimizer.shapes_of("resnet50"), torch.device("cpu")
    timers = optimizer.timers(every, shapes, cpu, CLOCK)
    yield Comparison(rows, [milliseconds(timer) for timer in timers])


def milliseconds(turn: Turn) -> Turn:
    """The same turn in milliseconds instead of seconds."""
    return lambda: {name: 1e3 * seconds for name, seconds in turn().items()}


@contextlib.contextmanager
def steps(folder: Path, options: argparse.Namespace) -> Iterator[Comparison]:
    """The trainer's step, and bare loops with the optimizers of other packages."""
    builders = {c.name: c.build for c in optimizer.candidates()}
    run: dict[str, Callable[[], object]] = {BARE: training.bare_step(SHAPE)}
    run["trainer, LARS"] = training.trainer_step(SHAPE)
    rows = [Row(name, BARE) for name in run]
    for package, name in (("timm.optim", "Lars"), ("pytorch_optimizer", "LARS")):
        build, label = builders[f"peer: {package} {name} foreach"], f"bare loop, {package} {name}"
        rows.append(Row(label, BARE, missing(package)))
        if build:
            run[label] = training.bare_step(SHAPE, in_groups(build))
    yield Comparison(rows, [alone(name, timed(step, clock=CLOCK)) for name, step in run.items()])


def in_groups(build: optimizer.Build) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """Build an optimizer for parameters in their two groups."""
    return lambda params: build(optimizer.parameter_groups(params))


@contextlib.contextmanager
def observers(folder: Path, options: argparse.Namespace) -> Iterator[Comparison]:
    """10 steps of two trainers in turn."""
    names = {False: "10 steps without observers", True: "10 steps, all observers read once"}
    shape = argparse.Namespace(model="resnet18", image_size=64, batch_size=16)
    with observed_steps(shape) as ten_steps:

        def turn() -> dict[str, float]:
            return {names[which]: 1e3 * seconds for which, seconds in ten_steps().items()}

        yield Comparison([Row(name, names[False]) for name in names.values()], [turn])


class Loaded(list):
    """Batches in memory, in place of a loader."""

    bad_images = ()


@contextlib.contextmanager
def validation(folder: Path, options: argparse.Namespace) -> Iterator[Comparison]:
    """Validation on images that are already in memory."""
    from lars import benchmark
    from lars.comm.world import World
    from lars.evaluation import evaluate
    from lars.learner.classification import Classification
    from lars.learner.forward import Forward
    from lars.models import build

    size = SHAPE.batch_size
    batches = Loaded([benchmark.noise(size, SHAPE.image_size, 1000)] * 4)
    task = Classification(mean=(127.5,) * 3, std=(64.0,) * 3)
    forward = Forward(task, torch.device("cpu"))
    model = build(SHAPE.model, 1000).to(memory_format=torch.channels_last).eval()
    job: Any = SimpleNamespace(world=World(), heartbeat=lambda _: None)

    def ours() -> int:
        evaluate(forward, model, batches, 4 * size, job)
        return 4 * size

    @torch.inference_mode()
    def bare() -> int:
        for batch in forward.prepared(batches):
            model(batch[0])
        return 4 * size

    bare_name = "bare loop, forward passes only"
    run: dict[str, Callable[[], int]] = {bare_name: bare, "trainer": ours}
    rows = [Row(name, bare_name) for name in run]
    peer = "bare loop with timm.utils.accuracy and AverageMeter"
    rows.append(Row(peer, bare_name, missing("timm")))
    if not rows[-1].lacks:
        run[peer] = lambda: timm_validation(forward.prepared(batches), model)
    yield Comparison(rows, [alone(name, speed(each, CLOCK)) for name, each in run.items()])


@torch.inference_mode()
def timm_validation(batches: Iterator[Any], model: nn.Module) -> int:
    """Validate as timm's script does: read the loss and both accuracies on the host after each batch."""
    from timm.utils import AverageMeter, accuracy

    loss_meter, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
    for images, labels in batches:
        output = model(images)
        loss = nn.functional.cross_entropy(output, labels)
        for meter, value in zip((top1, top5), accuracy(output, labels, topk=(1, 5)), strict=True):
            meter.update(value.item(), len(labels))
        loss_meter.update(loss.item(), len(labels))
    return top1.count


SUITES = (
    Suite(
        "optimizer",
        "Optimizer step",
        "A step on the 161 parameters of ResNet-50. The gradients are already there. `python -m benchmarks.optimizer` "
        "measures more candidates and other networks.",
        "CPU ms",
        optimizers,
    ),
    Suite(
        "step",
        "Training step",
        "A step of ResNet-50 with 16 images of 64 px in memory, float32, channels-last. "
        "`python -m benchmarks.training` measures larger images and two ranks.",
        "CPU ms",
        steps,
    ),
    Suite(
        "validation",
        "Validation",
        "ResNet-50 on 64 images of 64 px in memory, float32, channels-last: images per second of CPU time.",
        "images/s",
        validation,
    ),
    Suite(
        "observers",
        "Observers",
        "10 steps of ResNet-18 with 16 images of 64 px. The observers of a run read the metrics and every "
        "layer once in these steps. With the default of `--layers-every`, they read the layers less often.",
        "CPU ms",
        observers,
    ),
)
