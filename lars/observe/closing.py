"""summary.json: the results of the run so far, its machine, and its problems."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import time
from collections.abc import Iterator
from typing import Any

import torch

from lars import launcher
from lars.learner.learner import StepResult
from lars.observe.advice import warnings
from lars.observe.observer import Observer, Training
from lars.observe.output import say
from lars.observe.plan_lines import expected_curve
from lars.observe.summary import table
from lars.run.outcome import PARTS, duration, outcome, reached
from lars.run.records import Row, RunRecord


class Closing(Observer):
    """Writes summary.json whenever its values change, and prints the main values at the end.

    All values are of the whole run. They do not depend on how many jobs it took.
    """

    def __init__(self, training: Training) -> None:
        """Observe `training`. Nothing is written yet."""
        super().__init__(training)
        self.state = "training"
        self.fixed: dict[str, Any] = {}
        self.notes = 0

    def start(self) -> None:
        """Describe the machine, and replace the summary of an earlier job."""
        training = self.training
        curve = expected_curve(training.config, training.run.plan, training.source)
        self.fixed = {
            "expected_curve": None if curve is None else curve.name,
            "warnings": warnings(training),
            "environment": environment(training),
        }
        self.write()

    def step(self, result: StepResult) -> None:
        """Record a skipped step or a note at once, because the run may end by an error."""
        if result.stop:
            self.state = "stopped"
        if self.training.progress.skipped_in_a_row >= self.training.config.max_skipped_steps:
            self.state = "diverged"
        notes = len(self.training.progress.notes)
        if not result.taken or notes > self.notes:
            self.write()
        self.notes = notes

    def validated(self) -> None:
        """Record the results of the epoch."""
        self.write()

    def saved(self) -> None:
        """Record the progress."""
        self.write()

    def end(self) -> None:
        """Record the end, and print the main values."""
        plan, step = self.training.run.plan, self.training.progress.step
        self.state = "finished" if step == plan.total_steps else "stopped"
        say(closing_lines(self.write()))

    def write(self) -> dict[str, Any]:
        """Write and return the summary."""
        summary = self.summary() | self.fixed
        self.training.run.record("summary.json", summary)
        return summary

    def summary(self) -> dict[str, Any]:
        """The values that change during the run."""
        config, progress, plan = (
            self.training.config,
            self.training.progress,
            self.training.run.plan,
        )
        record = RunRecord(self.training.run.folder, [*progress.history, *self._unfinished()], {})
        task = self.training.learner.task
        found = outcome(record, metric=task.best, target=config.target_top1)
        return {
            "state": self.state,
            "written": time.strftime("%Y-%m-%d %H:%M:%S%z"),
            "step": progress.step,
            "total_steps": plan.total_steps,
            "epoch": plan.epoch_of(progress.step),
            **found,
            "skipped": progress.skipped,
            "skipped_steps": progress.skipped_steps,
            "notes": progress.notes,
            "bad_images": len(progress.bad_images),
            "init": progress.init,
        }

    def _unfinished(self) -> list[Row]:
        """The time of the unfinished epoch as a row without results."""
        progress = self.training.progress
        if not progress.seconds:
            return []
        epoch = self.training.run.plan.epoch_of(progress.step) + 1
        names = ("seconds", "data_seconds", "exchange_seconds")
        return [
            {"split": "train", "epoch": epoch, **{name: getattr(progress, name) for name in names}}
        ]


def environment(training: Training) -> dict[str, Any]:
    """The machine and the software of this job."""
    device = training.learner.device
    on_gpu = device.type == "cuda"
    return {
        **training.run.versions,
        "torchvision": importlib.metadata.version("torchvision"),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "ranks": training.run.plan.size,
        "cpus_per_rank": launcher.allotted_cpus(),
        "threads_per_rank": torch.get_num_threads(),
        "workers_per_rank": training.workers,
    }


def closing_lines(summary: dict[str, Any]) -> str:
    """The main values of a summary as a table."""
    return table(list(_closing_rows(summary)))


def _closing_rows(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    hours, share, target = summary["hours"], summary["time_share"], summary["target"]
    if target is not None:
        yield f"target {summary['metric']} {target['value']:g} %", reached(target)
    training, validation = (duration(3600 * hours[part]) for part in ("training", "validation"))
    yield "time", f"{training} of training, {validation} of validation"
    if summary["images_per_second"] is not None:
        yield "speed", f"{summary['images_per_second']:,.0f} images/s"
    if share:
        yield "time of a step", ", ".join(f"{part} {100 * share[part]:.1f} %" for part in PARTS)
    if summary["skipped"]:
        yield "skipped steps", f"{summary['skipped']}; summary.json has the causes"
