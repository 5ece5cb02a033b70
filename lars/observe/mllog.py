"""``--mllog``: the log of MLPerf Training, https://github.com/mlcommons/logging, in mllog.txt of the run folder.

``python -m mlperf_logging.compliance_checker --usage training --ruleset 4.0.0 mllog.txt`` checks it. MLPerf v4.0 is
the last one with ResNet. Two lines state what the trainer does not know: "submission_org" is "unknown", and
"cache_clear" has the value false, because only root can clear the caches of the operating system.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import torch

from lars.config.optimizer_flags import optimizer_row
from lars.errors import CheckpointError
from lars.learner.learner import StepResult
from lars.learner.trial import batch_norm_samples
from lars.observe.observer import Observer, Training
from lars.observe.output import GrowingFile
from lars.run.files import atomic_write
from lars.run.records import Row

# The quality target of MLPerf's ResNet in percent.
TARGET_TOP1 = 75.9
MARK = ":::MLLOG "
# About when the process started, in seconds.
STARTED = time.time()

Line = dict[str, Any]


class MLPerfLog(Observer):
    """Writes the log of a run of any number of jobs.

    A resumed job keeps the lines up to its checkpoint. So the log has a single start, and no epoch twice.
    """

    def __init__(self, training: Training) -> None:
        """Observe `training`. Nothing is written yet."""
        super().__init__(training)
        self.is_on = training.config.mllog
        self.file = GrowingFile(training.run.folder / "mllog.txt")

    def start(self) -> None:
        """Describe a new run, or keep the lines of an earlier job.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        if not self.is_on:
            return
        progress, plan = self.training.progress, self.training.run.plan
        lines = self._kept()
        try:
            with atomic_write(self.file.path) as file:
                file.writelines(map(_encoded, lines))
        except OSError as error:
            raise CheckpointError(
                f"--log-dir: {self.file.path} cannot be written: {error}"
            ) from error
        if not lines:
            self._write(*self._opening())
        elif plan.ends_epoch(progress.step) and not any(
            line["key"] == "eval_stop" and line["metadata"]["step"] == progress.step
            for line in lines
        ):
            self.validated()  # the last job may have ended before it wrote these lines

    def _kept(self) -> list[Line]:
        """The lines of earlier jobs up to the checkpoint."""
        run, progress = self.training.run, self.training.progress
        lacks_validation = run.lacks_validation(progress)
        kept = []
        for line in read(self.file.path):
            step = line["metadata"].get("step", 0)
            at_checkpoint = step == progress.step
            if step < progress.step or (
                at_checkpoint and (line["key"] == "epoch_stop" or not lacks_validation)
            ):
                kept.append(line)
        return kept if progress.step else []

    def _opening(self) -> Iterator[Line]:
        """The lines from the start of the process to the first step."""
        yield self._line("cache_clear", False)
        yield self._line("init_start", time_ms=round(STARTED * 1000))
        for key, value in description(self.training).items():
            yield self._line(key, value)
        yield self._line("init_stop")
        yield self._line("run_start")
        yield self._epoch("epoch_start", 1)

    def step(self, result: StepResult) -> None:
        """Mark the end of an epoch."""
        plan, step = self.training.run.plan, self.training.progress.step
        if not self.is_on or not plan.ends_epoch(step):
            return
        self._write(self._epoch("epoch_stop", 0))
        if not plan.validates(step):
            self._write(self._epoch("epoch_start", 1))

    def validated(self) -> None:
        """Write the accuracy of the trained network, and begin the next epoch."""
        progress, plan = self.training.progress, self.training.run.plan
        row = progress.last("val")
        if not self.is_on or row is None or row["step"] != progress.step:
            return
        began = round((time.time() - row["seconds"]) * 1000)
        self._write(
            self._epoch("eval_start", 0, time_ms=began),
            self._epoch("eval_accuracy", 0, _accuracy(self.training, row)),
            self._epoch("eval_stop", 0),
        )
        if progress.step < plan.total_steps:
            self._write(self._epoch("epoch_start", 1))

    def saved(self) -> None:
        """Retry earlier writes that failed."""
        if self.is_on:
            self.file.add(b"")

    def end(self) -> None:
        """Mark the end of the run. It is a success if a validation reached MLPerf's target."""
        progress, plan = self.training.progress, self.training.run.plan
        if not self.is_on or progress.step < plan.total_steps:
            return
        if any(line["key"] == "run_stop" for line in read(self.file.path)):
            return
        accuracies = [_accuracy(self.training, r) for r in progress.history if r["split"] == "val"]
        reached = max(accuracies, default=0.0) >= TARGET_TOP1 / 100
        self._write(self._line("run_stop", status="success" if reached else "aborted"))

    def _epoch(self, key: str, offset: int, value: Any = None, **more: Any) -> Line:
        """A line about an epoch: `offset` is 0 for the last finished one and 1 for the next one."""
        number = self.training.run.plan.epoch_of(self.training.progress.step) + offset
        return self._line(key, value, epoch_num=number, **more)

    def _line(
        self, key: str, value: Any = None, *, time_ms: int | None = None, **metadata: Any
    ) -> Line:
        kinds = {"start": "INTERVAL_START", "stop": "INTERVAL_END"}
        return {
            "namespace": "",
            "time_ms": round(time.time() * 1000) if time_ms is None else time_ms,
            "event_type": kinds.get(key.rpartition("_")[2], "POINT_IN_TIME"),
            "key": key,
            "value": value,
            "metadata": {
                "file": "lars/observe/mllog.py",
                "lineno": 0,
                "step": self.training.progress.step,
                **metadata,
            },
        }

    def _write(self, *lines: Line) -> None:
        self.file.add(b"".join(map(_encoded, lines)))


def _accuracy(training: Training, row: Row) -> float:
    """The main metric of a validation as a fraction."""
    best = training.learner.task.best
    return row[best] / training.learner.task.scales[best]


def _encoded(line: Line) -> bytes:
    return f"{MARK}{json.dumps(line)}\n".encode()


def read(path: Any) -> list[Line]:
    """The complete lines of a log. Empty if there is none."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return [
        json.loads(line.removeprefix(MARK))
        for line in text.splitlines(keepends=True)
        if line.startswith(MARK) and line.endswith("\n")
    ]


def description(training: Training) -> dict[str, Any]:
    """What MLPerf's rules for ResNet demand about the run: the keys and their values."""
    config, source, plan = training.config, training.source, training.run.plan
    device = training.learner.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    is_closed = (
        config.model == "resnet50"
        and config.base_op in ("lars", "sgd")
        and config.lr_schedule == "polynomial"
    )
    return {
        "submission_benchmark": "resnet",
        "submission_division": "closed" if is_closed else "open",
        "submission_org": "unknown",
        "submission_platform": f"{plan.size} x {name}",
        "submission_status": "research",
        "seed": config.seed,
        "train_samples": plan.train_size,
        "eval_samples": source.val_size,
        "global_batch_size": plan.effective_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "model_bn_span": batch_norm_samples(config, plan),
        "opt_name": config.base_op,
        **optimizer_description(training),
    }


def optimizer_description(training: Training) -> dict[str, Any]:
    """The hyper-parameters of the optimizer. Those of lars and sgd begin with its name, as the rules demand."""
    config, plan = training.config, training.run.plan
    prefix = {"lars": "lars_opt", "sgd": "sgd_opt"}.get(config.base_op, "opt")
    warmup = "lars_opt" if prefix == "lars_opt" else "opt"
    values = {
        f"{prefix}_base_learning_rate": plan.peak_lr,
        f"{prefix}_weight_decay": config.wd,
        f"{warmup}_learning_rate_warmup_epochs": config.warmup_epochs,
    }
    if config.base_op in ("lars", "sgd"):
        values[f"{prefix}_momentum"] = config.momentum
    if config.base_op == "lars":
        values["lars_epsilon"] = training.learner.optimizer.param_groups[0]["eps"]
    if config.lr_schedule == "polynomial":
        power = config.lr_power
        if power is None:
            power = optimizer_row(config.base_op).lr_power
        values |= {
            f"{prefix}_end_learning_rate": config.end_lr,
            f"{prefix}_learning_rate_decay_poly_power": power,
            f"{prefix}_learning_rate_decay_steps": plan.total_steps - plan.warmup_steps,
        }
    return values
