"""What a run shows during training: readings, TensorBoard's layout, the time left, minute lines, MLPerf's log."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import sys
import time
import types
from dataclasses import dataclass, field

import pytest
import torch
from run_folders import scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from conftest import until
from lars.comm.world import World
from lars.config import Config
from lars.errors import UsageError
from lars.job.job import job_of
from lars.learner.classification import Classification
from lars.learner.learner import StepResult
from lars.observe import console
from lars.observe.board import Board
from lars.observe.console import Console
from lars.observe.log import RunLog
from lars.observe.mllog import MLPerfLog, read
from lars.observe.observer import Training
from lars.observe.output import say
from lars.observe.profile import Profile
from lars.observe.time_left import TimeLeft
from lars.run.files import report
from lars.run.folder import Run
from lars.run.progress import Progress

SCALES = Classification().scales


def taken(**values) -> StepResult:
    return StepResult(taken=True, stop=False, save=False, **values)


@dataclass(frozen=True)
class Source:
    """Three steps of 32 samples in an epoch, the last of 6."""

    train_dir: str = field(default="x", metadata={"same_run": False})
    train_size, val_size, num_classes, fingerprint = 70, 10, 10, "ab-cd"
    class_names = ()


def training_in(folder, **flags) -> Training:
    """A training at its start, without a network."""
    given = {"epochs": 3, "batch_size": 32, "base_lr": 0.1, "warmup_epochs": 0.0}
    config = Config(log_dir=str(folder.parent), run_name=folder.name, **(given | flags))
    optimizer = types.SimpleNamespace(param_groups=[{"eps": 0.0}])
    learner = types.SimpleNamespace(
        task=Classification(), lr_at=lambda step: 0.1, networks=lambda: {"val": None},
        device=torch.device("cpu"), optimizer=optimizer,
    )  # fmt: skip
    run = Run(config, Source(), World())
    return Training(config, Source(), run, learner, Progress(), phase=lambda: "batch 3")


def test_a_reading_is_about_the_steps_since_the_last_one():
    progress = Progress()
    totals = torch.tensor([8.0, 2.0, 4.0, 4.0], dtype=torch.float64)
    for norm, data in ((3.0, 0.0), (5.0, 1.0), (4.0, 0.5)):
        progress.advance(taken(samples=8, seconds=2.0, data_seconds=data, grad_norm=norm))
    progress.advance(StepResult(False, False, False, seconds=2.0, grad_norm=float("inf")))
    progress.read(totals, SCALES, 0.1, 3 * 2**29)
    assert progress.new_reading() == {
        "loss": 2.0, "top1": 50.0, "top5": 100.0, "lr": 0.1, "images_per_second": 3.0,
        "data_share": 1.5 / 8, "grad_norm": 5.0, "gpu_memory_gib": 1.5,
    }  # fmt: skip
    progress.advance(taken(samples=8, seconds=2.0, grad_norm=1.0))
    progress.read(totals, SCALES, 0.1)
    reading = progress.new_reading()
    assert (reading["grad_norm"], reading["data_share"]) == (1.0, 0.0)
    assert "gpu_memory_gib" not in reading, "on a CPU"


def test_tensorboard_gets_a_layout_and_the_flags_once_for_all_jobs(tmp_path):
    for job in range(2):
        training = training_in(tmp_path, base_op="lars", wd=5e-5)
        training.progress.step = 2 * job
        log, board = RunLog(training), Board(training)
        log.start()
        board.start()
        training.curves.scalars({"val/top1": 50.0 + job}, 3)
    board.end()
    shown = EventAccumulator(str(tmp_path)).Reload()
    (tensor,) = {t.tensor_proto.string_val[0] for t in shown.Tensors("custom_scalars__config__")}
    charts = [chart for category in Layout.FromString(tensor).category for chart in category.chart]
    titles = [chart.title for chart in charts]
    over_images = ["loss over training images", "top1 over training images"]
    assert titles[:5] == ["loss", "top1", *over_images, "learning rate"]
    assert not any("GPU" in title for title in titles), "on a CPU"
    assert list(charts[0].multiline.tag) == ["^train/loss$", "^val/loss$"]

    def plugin(kind):
        data = shown.SummaryMetadata(f"_hparams_/{kind}").plugin_data
        return getattr(HParamsPluginData.FromString(data.content), kind)

    flags = plugin("session_start_info").hparams
    assert flags["wd"].number_value == 5e-5
    assert flags["base_op"].string_value == "lars"
    assert flags["effective_batch_size"].number_value == 32
    assert flags["clip_grad_norm"].string_value == "None"
    assert not {"train_dir", "log_dir"} & set(flags), "paths are no hyper-parameters"
    names = [info.name.tag for info in plugin("experiment").metric_infos]
    assert names == ["val/top1", "val/loss", "val/top5"]
    assert plugin("session_end_info").status == 1, "STATUS_SUCCESS"
    assert scalars(tmp_path)["val/top1"] == [(3, 51.0)], "the point of the killed job is gone"


class AddsAStep(int):
    """The samples of a step during whose reading another step is added, as by another thread."""

    def __new__(cls, left: TimeLeft):
        self = super().__new__(cls, 32)
        self.left = left
        return self

    def read(self) -> float:
        self.left.steps.append((self, 16.0))
        return self.left.images_per_second()

    def __radd__(self, other):
        self.left.step(taken(samples=32, seconds=16.0))
        return int(self) + int(other)


def test_the_time_left_counts_training_and_validations(tmp_path):
    training = training_in(tmp_path, val_every=2)
    left, progress = TimeLeft(training), training.progress
    progress.step = 1
    left.step(taken(samples=32, seconds=1000.0))  # the first step of a job
    assert left.text() == ""
    progress.step = 2
    left.step(taken(samples=32, seconds=16.0))
    assert left.images_per_second() == 2.0
    assert left.epoch() == 6 / 2, "the last step is short"
    # Epochs 2 and 3 have 70 images each. The epochs 2 and 3 are validated, at first at the speed of training.
    assert left.run() == (6 + 140 + 2 * 10) / 2
    progress.history = [{"split": "val", "seconds": 0.5}]
    assert left.run() == (6 + 140) / 2 + 2 * 0.5
    assert left.text() == "epoch 00:03, run 01:14 left"
    progress.step = 9
    assert (left.epoch(), left.run()) == (0, 0)
    assert AddsAStep(left).read() == 2.0
    limited = TimeLeft(training_in(tmp_path, max_steps=4))
    limited.training.progress.step = 3
    limited.steps.append((32, 16.0))
    assert limited.run() == 32 / 2


def test_a_single_line_in_a_log_file_has_a_date(monkeypatch, capsys):
    say("one line")
    say("a table\nof two lines")
    monkeypatch.setenv("LARS_TERMINAL", "80")
    say("to a terminal")
    dated, *rest = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  one line", dated)
    assert rest == ["a table", "of two lines", "to a terminal"]


@pytest.fixture
def short_interval(monkeypatch):
    monkeypatch.setattr(console, "INTERVAL", 0.3)
    monkeypatch.setattr(console.summary, "summary", lambda training: "the plan")
    monkeypatch.setattr(console, "warnings", lambda training: [])


def test_a_log_file_gets_lines_while_a_step_or_a_validation_takes_long(
    tmp_path, short_interval, monkeypatch
):
    lines: list[tuple[float, str]] = []
    monkeypatch.setattr(console, "say", lambda text: lines.append((time.monotonic(), text)))
    training = training_in(tmp_path)
    observer = Console(training)
    observer.start()
    until(lambda: len(lines) >= 3, 10)  # nothing happens, as in a long first step
    assert lines[1][1] == "epoch 1  step 0/3  now: batch 3"
    assert lines[2][0] - lines[1][0] >= 0.29
    training.progress.step = 2
    training.progress.reading = {
        "loss": 2.0, "top1": 50.0, "top5": 90.0, "lr": 0.1, "images_per_second": 30.4,
    }  # fmt: skip
    for _ in range(2):
        observer.step(taken(samples=32, seconds=8.0))
    count = len(lines)
    until(lambda: len(lines) > count, 10)
    assert lines[-1][1] == (
        "epoch 1  step 2/3  loss 2.0000 top1  50.00 % top5  90.00 % lr 0.1  30 images/s  "
        "epoch 00:01, run 00:44 left  now: batch 3"
    )
    observer.step(StepResult(taken=True, stop=True, save=True))
    count = len(lines)
    time.sleep(0.7)
    assert len(lines) == count, "the thread has ended"


def test_after_an_error_the_console_prints_no_more_lines(tmp_path, short_interval, monkeypatch):
    """A process can go on after its job, for example in a notebook. No observer sees the end of a failed job."""
    lines: list[str] = []
    monkeypatch.setattr(console, "say", lines.append)
    monkeypatch.setattr(World, "abort", lambda world, code: sys.exit(code))

    def fail() -> None:
        with job_of(Config(stop_signals=[])) as job:
            job.heartbeat("step 1")
            training = dataclasses.replace(training_in(tmp_path), phase=lambda: job.phase)
            Console(training).start()
            until(lambda: "epoch 1  step 0/3  now: step 1" in lines, 10)
            raise UsageError("an error")

    with pytest.raises(SystemExit):
        fail()
    count = len(lines)
    time.sleep(0.7)
    assert len(lines) == count


def test_the_progress_bar_shows_the_main_metrics_and_the_time_left(
    tmp_path, short_interval, monkeypatch, capsys
):
    monkeypatch.setenv("LARS_TERMINAL", "120")
    monkeypatch.setattr(console.tqdm, "monitor_interval", 0)
    training = training_in(tmp_path)
    observer = Console(training)
    training.progress.reading = {
        "loss": 2.0, "top1": 50.0, "top5": 90.0, "lr": 0.1, "images_per_second": 30.4,
    }  # fmt: skip
    for step in (1, 2):
        training.progress.step = step
        observer.step(taken(samples=32, seconds=8.0))
        if observer.bar is not None:
            observer.bar.refresh()
    shown = capsys.readouterr().err.split("\x1e")[-1].rstrip()
    assert re.fullmatch(
        r"epoch 1 \|.+\| 2/3, epoch 00:01, run 00:44 left  loss 2.0000 top1  50.00 % lr 0.1  30 images/s", shown
    ), shown  # fmt: skip
    observer.close()
    assert observer.bar is None


def run_with_log(training, steps: range, *, validate_last: bool = True) -> None:
    """Take steps as the engine does. The job may be killed before its last validation."""
    log, progress, plan = MLPerfLog(training), training.progress, training.run.plan
    log.start()
    for step in steps:
        progress.step = step
        log.step(taken())
        log.saved()
        if plan.validates(step) and (validate_last or step != steps[-1]):
            row = {"split": "val", "step": step, "top1": 76.0, "seconds": 0.1}
            progress.history.append(row)
            log.validated()
    if progress.step == plan.total_steps:
        log.end()


EPOCHS = [
    ("epoch_start", 1), ("epoch_stop", 1), ("eval_start", 1), ("eval_accuracy", 1), ("eval_stop", 1),
    ("epoch_start", 2), ("epoch_stop", 2), ("eval_start", 2), ("eval_accuracy", 2), ("eval_stop", 2),
    ("epoch_start", 3), ("epoch_stop", 3), ("eval_start", 3), ("eval_accuracy", 3), ("eval_stop", 3),
]  # fmt: skip


@pytest.mark.parametrize("killed_in_validation", [False, True])
def test_the_log_of_mlperf_has_every_epoch_once_after_a_kill(tmp_path, killed_in_validation):
    first = training_in(tmp_path, base_op="lars", mllog=True)
    run_with_log(first, range(1, 9))  # its last checkpoint is that of step 6
    again = training_in(tmp_path, base_op="lars", mllog=True)
    again.progress.step = 6
    again.progress.history = first.progress.history[: 1 if killed_in_validation else 2]
    if killed_in_validation:  # then the engine validates first
        log = MLPerfLog(again)
        log.start()
        again.progress.history.append(first.progress.history[1])
        log.validated()
    run_with_log(again, range(7, 10))
    lines = read(tmp_path / "mllog.txt")
    epochs = [(x["key"], x["metadata"]["epoch_num"]) for x in lines if "epoch_num" in x["metadata"]]
    assert epochs == EPOCHS
    keys = [line["key"] for line in lines]
    assert keys.count("run_start") == keys.count("run_stop") == keys.count("init_start") == 1
    assert keys[-1] == "run_stop"
    assert lines[-1]["metadata"]["status"] == "success"
    times = [line["time_ms"] for line in lines if line["key"].endswith("_stop")]
    assert times == sorted(times)
    finished = (tmp_path / "mllog.txt").read_bytes()
    again.progress.step = 9
    run_with_log(again, range(9, 9))  # the same command after the end of the run
    assert (tmp_path / "mllog.txt").read_bytes() == finished


def test_the_log_of_mlperf_is_written_only_on_request(tmp_path):
    run_with_log(training_in(tmp_path), range(1, 10))
    assert not (tmp_path / "mllog.txt").exists()


@pytest.mark.parametrize("base_op", ["lars", "sgd", "lamb"])
def test_the_log_of_mlperf_is_accepted_by_its_compliance_checker(tmp_path, base_op):
    pytest.importorskip("mlperf_logging", reason="pip install mlperf-logging for this test")
    training = training_in(
        tmp_path, base_op=base_op, mllog=True, wd=1e-4, end_lr=1e-4, model="resnet50"
    )
    run_with_log(training, range(1, 10))
    division = "open" if base_op == "lamb" else "closed"
    path = tmp_path / "mllog.txt"
    assert f'"submission_division", "value": "{division}"' in path.read_text()
    checker = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training"]
    done = subprocess.run(
        [*checker, "--ruleset", "4.0.0", "--werror", str(path)], cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "SUCCESS" in done.stdout + done.stderr, done.stdout + done.stderr


def test_a_profile_after_the_end_of_the_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--profile 10: the run ends after step 9"):
        Profile(training_in(tmp_path, profile=10))
    with pytest.raises(UsageError, match="--profile must be at least 1"):
        training_in(tmp_path, profile=0)


def test_a_line_that_cannot_be_written_does_not_end_the_run(monkeypatch):
    written = False
    with contextlib.suppress(OSError), open("/dev/full", "w") as log:  # closing it fails too
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", log)
            say("epoch 1")
            report("warning: the checkpoint of step 3 could not be written")
        written = True
    assert written
