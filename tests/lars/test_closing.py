"""summary.json: the results of a run, even if it took several jobs."""

from __future__ import annotations

import json
import math
import types
from pathlib import Path

import pytest
import torch

from lars.comm.world import World
from lars.config import Config, UsageError
from lars.learner.classification import Classification
from lars.learner.learner import StepResult
from lars.observe.closing import Closing
from lars.observe.observer import Training
from lars.run.folder import Run
from lars.run.outcome import duration, outcome
from lars.run.progress import RECORDED, Progress
from lars.run.records import RunRecord


def record(*top1: float, split: str = "val") -> RunRecord:
    """A run whose epochs took 36 s for training, a third of it for data, and 3.6 s for validation."""
    rows = []
    for epoch, value in enumerate(top1, start=1):
        place = {"epoch": epoch, "step": 10 * epoch}
        times = {"seconds": 36.0, "data_seconds": 12.0, "exchange_seconds": 3.0}
        rows.append({"split": "train", **place, "images_per_second": 100.0, **times})
        rows.append({"split": split, **place, "loss": 1.0, "top1": value, "seconds": 3.6})
    return RunRecord(Path("run"), rows, {})


def test_the_outcome_is_that_of_the_whole_run():
    found = outcome(record(10.0, 76.0, 75.0), target=75.9)
    assert (found["best"]["epoch"], found["best"]["top1"]) == (2, 76.0)
    assert (found["last"]["epoch"], found["last"]["top1"]) == (3, 75.0)
    assert found["target"] == {"value": 75.9, "epoch": 2, "training_hours": pytest.approx(0.02)}
    assert found["hours"] == pytest.approx({"training": 0.03, "validation": 0.003})
    assert found["images_per_second"] == pytest.approx(100)
    assert found["time_share"] == pytest.approx(
        {"data": 1 / 3, "exchange": 1 / 12, "compute": 7 / 12}
    )


def test_the_first_validation_that_reaches_the_target_counts_even_of_the_average():
    both = record(50.0, 76.5)
    both.rows.insert(3, {"split": "val_ema", "epoch": 1, "step": 10, "top1": 76.0, "seconds": 0.0})
    assert outcome(both, target=75.9)["target"]["epoch"] == 1
    assert outcome(both, target=77.0)["target"] == {
        "value": 77.0, "epoch": None, "training_hours": None,
    }  # fmt: skip
    assert outcome(both)["target"] is None


def test_a_run_without_results_or_with_results_that_are_not_finite_has_an_outcome():
    empty = outcome(RunRecord(Path("run"), [], {}), target=50.0)
    assert empty["best"] is empty["last"] is empty["images_per_second"] is None
    assert empty["time_share"] == {}
    diverged = outcome(record(10.0, math.nan))
    assert diverged["best"]["epoch"] == 1
    assert diverged["last"]["top1"] is None
    json.dumps(diverged, allow_nan=False)


def test_rows_of_older_versions_have_no_shares():
    older = record(10.0)
    del older.rows[0]["data_seconds"], older.rows[0]["exchange_seconds"]
    assert outcome(older)["time_share"] == {}


def test_images_per_second_weighs_epochs_by_their_time():
    two = record(1.0, 2.0)
    two.rows[2] |= {"images_per_second": 400.0, "seconds": 9.0}
    assert outcome(two)["images_per_second"] == pytest.approx(160), "7200 images in 45 s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.25, "0.25 s"), (59, "59 s"), (65, "1 min 5 s"), (3599.7, "1 h 0 min"), (108060, "30 h 1 min")],
)  # fmt: skip
def test_a_time_has_the_unit_that_suits_it(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("value", ["0.759", "100"])
def test_a_target_that_is_no_percentage_is_refused(value):
    with pytest.raises(UsageError, match="--target-top1 must be"):
        Config(target_top1=float(value))


class Source:
    """As much of a source as the observer reads."""

    train_size, val_size, num_classes, fingerprint = 16, 4, 2, "ab"
    class_names = ()


@pytest.fixture
def training(tmp_path, monkeypatch):
    """A training of 2 epochs of 2 steps whose run folder is `tmp_path`."""
    monkeypatch.setattr("lars.run.folder.same_run", lambda *parts: {})
    monkeypatch.setattr("lars.observe.closing.warnings", lambda training: ["a doubtful flag"])
    config = Config(
        log_dir=str(tmp_path.parent), run_name=tmp_path.name, batch_size=8, epochs=2,
        warmup_epochs=0, target_top1=50.0, expected_curve="mlperf-408",
    )  # fmt: skip
    learner = types.SimpleNamespace(task=Classification(), device=torch.device("cpu"))
    run = Run(config, Source(), World())
    return Training(config, Source(), run, learner, Progress())


STEP = StepResult(True, False, False, samples=8, seconds=2.0, data_seconds=0.5)


def read(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_the_summary_follows_the_run_across_jobs(training, tmp_path, capsys):
    closing, progress = Closing(training), training.progress
    closing.start()
    assert read(tmp_path)["state"] == "training"
    assert read(tmp_path)["warnings"] == ["a doubtful flag"]
    assert read(tmp_path)["environment"]["device"] == "cpu"
    assert read(tmp_path)["expected_curve"] == "mlperf-408"
    for result in (STEP, STEP._replace(stop=True)):
        progress.advance(result)
        closing.step(result)
    closing.saved()
    stopped = read(tmp_path)
    assert (stopped["state"], stopped["step"], stopped["epoch"]) == ("stopped", 2, 1)
    assert stopped["hours"]["training"] == pytest.approx(4 / 3600)
    assert stopped["time_share"]["data"] == pytest.approx(0.25)

    again = Closing(training)  # the next job, which resumes from the same progress
    again.start()
    assert read(tmp_path)["state"] == "training"
    progress.totals[-1] = 16
    scales = training.learner.task.scales
    progress.end_epoch(training.run.plan, 0.1, scales)
    progress.history.append({"split": "val", "epoch": 1, "step": 2, "top1": 60.0, "seconds": 1.0})
    again.validated()
    assert read(tmp_path)["target"]["epoch"] == 1
    for _ in range(2):
        progress.advance(STEP)
    again.end()
    finished = read(tmp_path)
    assert (finished["state"], finished["step"]) == ("finished", 4)
    assert finished["hours"]["training"] == pytest.approx(8 / 3600)
    printed = capsys.readouterr().out
    assert "target top1 50 %" in printed
    assert "reached in epoch 1, after 4 s of training" in printed
    assert "data 25.0 %, exchange 0.0 %, compute 75.0 %" in printed


def test_a_skipped_step_is_recorded_at_once(training, tmp_path):
    closing = Closing(training)
    closing.start()
    skipped = StepResult(False, False, False, nonfinite=True, cause="not finite, first in fc.bias")
    training.progress.advance(skipped)
    closing.step(skipped)
    assert read(tmp_path)["skipped"] == 1
    assert read(tmp_path)["skipped_steps"] == [{"step": 1, "cause": "not finite, first in fc.bias"}]


def test_the_step_that_ends_a_run_is_recorded(training, tmp_path):
    closing = Closing(training)
    closing.start()
    skipped = StepResult(False, False, False, nonfinite=True, cause="not finite")
    for _ in range(training.config.max_skipped_steps):
        training.progress.advance(skipped)
        closing.step(skipped)
    assert read(tmp_path)["state"] == "diverged"
    assert read(tmp_path)["skipped"] == training.config.max_skipped_steps


def test_a_note_of_another_observer_is_recorded_at_once(training, tmp_path):
    closing = Closing(training)
    closing.start()
    training.progress.advance(STEP)
    training.progress.note("layer1 left its range")
    closing.step(STEP)
    assert read(tmp_path)["notes"] == [{"step": 1, "text": "layer1 left its range"}]


def test_the_record_of_skipped_steps_has_a_limit():
    progress = Progress()
    for _ in range(RECORDED + 5):
        progress.advance(StepResult(False, False, False, cause="no images"))
    assert (progress.skipped, len(progress.skipped_steps)) == (RECORDED + 5, RECORDED)
