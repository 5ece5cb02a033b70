"""Reading runs: python -m lars.history on finished, running, incomplete and missing runs."""

from __future__ import annotations

import csv
import math
import signal
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from run_folders import row, write_run

from conftest import ROOT, run, without_reader
from lars import history
from lars.config.plan import Plan
from lars.learner.classification import Classification
from lars.learner.learner import StepResult
from lars.run.progress import Progress
from lars.run.records import RunRecord, read_runs

DAMAGED = {
    "half a line": b'{"split": "val", "epo',
    "a line without its end": b'{"split": "val", "epoch": 6}',
    "noise": b"\xff\x00",
}


def test_improvements_have_the_seconds_of_training_without_validation(tmp_path, capsys):
    history.main([str(write_run(tmp_path / "run"))])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == [str(tmp_path / "run")]
    assert lines[1] == ["epoch", "step", "top-1", "%", "training", "s"]
    assert lines[2:5] == [
        ["1", "4", "10.00", "10.0"], ["2", "8", "40.00", "20.0"], ["5", "20", "60.00", "50.0"],
    ]  # fmt: skip
    text = " ".join(" ".join(line) for line in lines[5:])
    assert "best top-1 60.00 % (epoch 5), last 60.00 % (epoch 5)" in text
    assert "5 of 5 epochs; 50.0 s (0.0139 h) of training, 5.0 s (0.00139 h) of validation" in text


def test_the_moving_average_can_be_the_best(tmp_path, capsys):
    rows = [row("train", 1), row("val", 1), row("val_ema", 1, top1=20.0)]
    rows += [row("train", 2), row("val", 2, top1=15.0), row("val_ema", 2, top1=18.0)]
    history.main([str(write_run(tmp_path / "run", rows))])
    output = capsys.readouterr().out
    assert [line.split()[-1] for line in output.splitlines()[2:4]] == ["val", "val_ema"]
    assert "best top-1 20.00 % (epoch 1), last 15.00 % (epoch 2)" in output


def test_a_validation_that_is_nan_improves_nothing(tmp_path):
    rows = [row("val", 1, top1=math.nan), row("val", 2), row("val", 4)]
    record = RunRecord.read(write_run(tmp_path / "run", rows))
    assert [r["epoch"] for r in history.improvements(record)] == [2]


def test_epochs_without_a_validation_count_as_training(tmp_path):
    rows = [row("train", 1), row("train", 2), row("val", 2)]
    record = RunRecord.read(write_run(tmp_path / "run", rows))
    assert record.training_seconds(2) == 20
    assert [r["epoch"] for r in history.improvements(record)] == [2]


def test_the_seconds_of_an_epoch_include_those_before_an_interruption():
    """A checkpoint within the epoch stores them. Steps after the checkpoint are lost, and so are their seconds."""
    plan = Plan(1, 4, 1, 4, 8, 2, 4, 0.0, 0.1)
    scales = Classification().scales
    progress = Progress.starting(Progress().totals)
    step = StepResult(taken=True, stop=False, save=False, samples=4, seconds=1.5)
    progress.advance(step)
    saved = {f.name: getattr(progress, f.name) for f in fields(progress)}
    progress.advance(step)
    resumed = Progress(**saved)
    resumed.advance(step._replace(seconds=2.0))
    resumed.end_epoch(plan, 0.1, scales)
    assert resumed.history[-1]["seconds"] == 3.5


def test_tables_have_a_row_for_each_epoch_of_all_runs(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path / "logs" / name)
    files = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "parquet")}
    history.main([str(tmp_path / "logs"), "--csv", str(files["csv"]), "--parquet", str(files["parquet"])])  # fmt: skip
    with open(files["csv"], newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [
        "run", "epoch", "step", "train_loss", "train_acc", "test_loss", "test_acc", "train_top5", "test_top5", "lr",
        "images_per_second", "training_seconds",
    ]  # fmt: skip
    assert [Path(line["run"]).name for line in lines] == ["one"] * 5 + ["two"] * 5
    assert [float(line["test_acc"]) for line in lines[:3]] == [10, 40, 35]
    assert [float(line["training_seconds"]) for line in lines[5:]] == [10, 20, 30, 40, 50]
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet needs pyarrow")
    table = parquet.read_table(files["parquet"]).to_pylist()
    assert [line["test_loss"] for line in table] == [float(line["test_loss"]) for line in lines]
    assert table[0]["epoch"] == 1
    assert not list(tmp_path.glob(".tmp-*"))


def test_all_epochs_are_shown(tmp_path, capsys):
    history.main([str(write_run(tmp_path / "run")), "--all"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["epoch", "step", "train_loss", "train_acc"]
    assert [line.split()[0] for line in lines[2:7]] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("tail", DAMAGED)
def test_a_live_run_is_read_up_to_its_last_complete_line(tmp_path, tail, capsys):
    folder = write_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(DAMAGED[tail])
    history.main([str(folder)])
    assert "last 60.00 % (epoch 5)" in capsys.readouterr().out


def test_a_run_that_has_just_begun_is_no_error(tmp_path, capsys):
    folder = write_run(tmp_path / "run", [])
    history.main([str(folder), "--csv", str(tmp_path / "x.csv")])
    assert "0 of 5 epochs" in capsys.readouterr().out
    (folder / "metrics.jsonl").unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").touch()
    assert [r.folder.name for r in read_runs([tmp_path])] == ["other", "run"]


def test_other_metrics_are_named_if_there_is_no_top1(tmp_path, capsys):
    rows = [{k: v for k, v in row(s, 1).items() if "top" not in k} for s in ("train", "val")]
    history.main([str(write_run(tmp_path / "run", rows))])
    assert "no validation has a top-1 yet; the last row has loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere does not exist; name a run folder"),
        (["file"], "file is not a folder"),
        (["empty"], "empty holds no run: there is no metrics.jsonl in it"),
        (["run", "--csv", "nowhere/x.csv"], "--csv nowhere/x.csv cannot be written: No such file"),
    ],
)
def test_errors_name_the_path_and_the_fix(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "file").touch()
    (tmp_path / "empty" / "model").mkdir(parents=True)
    (tmp_path / "empty" / "model" / "config.json").write_text('{"flags": 1}')  # of another program
    with pytest.raises(SystemExit) as stop:
        history.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", ["history", "plot"])
def test_reading_runs_does_not_load_torch(module):
    done = run(sys.executable, "-X", "importtime", "-m", f"lars.{module}", "--help")
    assert done.returncode == 0
    loaded = {line.rsplit("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "lars.run.records" in loaded
    assert "torch" not in loaded
    assert str(ROOT) not in done.stdout


def test_head_ends_the_program_silently(tmp_path):
    write_run(tmp_path / "run")
    for words in (
        ["-m", "lars.history", tmp_path],
        ["-m", "lars.identify", "lars:LARS"],
        ["train_imagenet.py", "--recipe", "list"],
    ):
        assert without_reader(sys.executable, *words) == (-signal.SIGPIPE, "")
