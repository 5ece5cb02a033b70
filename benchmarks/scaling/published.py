"""Published MLPerf runs of ResNet-50, the model's error on them, and the time to 75.9 % top-1 that it predicts.

published.csv holds results of NVIDIA's systems in MLPerf Training 0.7 to 4.0, closed division (the repositories
training_results_v... of github.com/mlcommons). `images_per_second` is the submitter's throughput. It is
empty where only the time is known.

epochs.csv holds the epochs to 75.9 % by batch size: means of MLPerf's reference points
(github.com/mlcommons/logging, rcp_checker/training_4.0.0/rcps_resnet.json), and single submissions between them.
`bn_span` is the number of samples of a BatchNorm statistic, which MLPerf records because the epochs depend on it.
"""

from __future__ import annotations

import csv
import math
from functools import cache
from typing import NamedTuple

from benchmarks.scaling import presets
from benchmarks.scaling.machine import Machine
from benchmarks.scaling.predict import Job, Step, predict, training

# MLPerf's rules for ResNet-50: validate every 4 epochs. The clock starts when the training data is first read.
VALIDATE_EVERY = 4.0
# Hosts of 8 GPUs, as in all published rows.
PER_NODE = 8


class Point(NamedTuple):
    """A published run. `minutes` is the time to 75.9 % top-1; `rate` is in images/s of all GPUs, or None."""

    round: str
    gpu: str
    network: str
    gpus: int
    batch: int
    epochs: float
    minutes: float
    rate: float | None

    @property
    def bn_ranks(self) -> int:
        """GPUs that share BatchNorm statistics, if each has its equal part of the batch."""
        return sharing(self.gpus, self.batch)


@cache
def points() -> list[Point]:
    """All published runs."""
    with (presets.FOLDER / "published.csv").open() as file:
        return [
            Point(
                r["round"], r["gpu"], r["network"], int(r["gpus"]), int(r["batch"]),
                float(r["epochs"]), float(r["minutes"]),
                float(r["images_per_second"]) if r["images_per_second"] else None,
            )
            for r in csv.DictReader(file)
        ]  # fmt: skip


class Epochs(NamedTuple):
    """The published epochs to 75.9 % top-1 with a batch size. `bn_span` is None if it is not known."""

    batch: int
    epochs: float
    bn_span: int | None
    source: str


@cache
def epochs() -> list[Epochs]:
    """The published epochs to 75.9 % top-1, by rising batch size."""
    with (presets.FOLDER / "epochs.csv").open() as file:
        return [
            Epochs(
                int(r["batch"]), float(r["epochs"]), int(r["bn_span"]) if r["bn_span"] else None, r["source"]
            )
            for r in csv.DictReader(file)
        ]  # fmt: skip


def sharing(gpus: int, batch: int) -> int:
    """GPUs that share BatchNorm statistics, so that a statistic has as many samples as in the published runs.

    The number of samples is that of the reference point with the nearest batch size.
    """
    known = [row for row in epochs() if row.bn_span]
    nearest = min(known, key=lambda row: abs(math.log(row.batch / batch)))
    return min(gpus, max(1, round((nearest.bn_span or 0) * gpus / batch)))


class Comparison(NamedTuple):
    """A published run and what the model predicts for it."""

    point: Point
    step: Step
    minutes: float

    @property
    def rate_error(self) -> float:
        """Relative error of the predicted images/s. NaN if they are not published."""
        return self.step.rate / self.point.rate - 1 if self.point.rate else math.nan

    @property
    def minutes_error(self) -> float:
        """Relative error of the predicted minutes."""
        return self.minutes / self.point.minutes - 1


def compare(point: Point) -> Comparison:
    """Predict a published run from the preset of its GPU and its network."""
    machine = presets.machine(point.gpu, presets.NETWORKS[point.network])
    machine = on_mlperf_clock(machine)
    job = Job(point.gpus // PER_NODE, PER_NODE, point.batch, point.bn_ranks)
    step = predict(machine, job)
    minutes = training(machine, step, point.epochs, validate_every=VALIDATE_EVERY).minutes
    return Comparison(point, step, minutes)


class Choice(NamedTuple):
    """The predicted time to 75.9 % top-1 with one batch size."""

    step: Step
    published: Epochs
    minutes: float
    gpu_hours: float


def choices(machine: Machine, nodes: int, per_node: int) -> list[Choice]:
    """The predictions for every published batch size that gives each rank at least one sample, fastest first.

    GPUs with a small batch share BatchNorm statistics as in the published runs, because the epochs depend on it.
    """
    found, gpus = [], nodes * per_node
    for row in epochs():
        if row.batch >= gpus:
            step = predict(machine, Job(nodes, per_node, row.batch, sharing(gpus, row.batch)))
            whole = training(machine, step, row.epochs, validate_every=VALIDATE_EVERY)
            found.append(Choice(step, row, whole.minutes, whole.gpu_hours))
    return sorted(found, key=lambda choice: choice.minutes)


def on_mlperf_clock(machine: Machine) -> Machine:
    """MLPerf's clock leaves out the start, and its runs write no checkpoints."""
    return machine.replace(start=0.0, checkpoint=0.0)
