"""``--evaluate`` gives the numbers of the run that wrote the weights, on any number of ranks, and writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from run_folders import rows

import train_imagenet
from conftest import CLASSES, GOLDENS, ROOT, VAL, flags

SCRIPT = ROOT / "train_imagenet.py"
METRICS = ("loss", "top1", "top5")


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory, mpirun) -> Path:
    """The folder of a run with a moving average on 2 ranks, stopped after the first step of its second epoch."""
    logs = tmp_path_factory.mktemp("trained")
    done = mpirun(2, SCRIPT, *flags(folders, logs), "--ema-decay", "0.5", "--max-steps", "4")
    assert done.returncode == 0, done.stderr
    return logs / "run"


@pytest.fixture
def val_only(folders, tmp_path) -> Path:
    """A folder of data sets that holds only the validation images."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "val").symlink_to(folders / "val")
    return tmp_path / "images"


def results(output: str) -> list[dict]:
    """The JSON rows in the output of --evaluate."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


@pytest.fixture
def evaluated(val_only, tmp_path, monkeypatch, capsys):
    """``evaluated(path, *flags)`` evaluates a file on one rank in this process.

    It returns the JSON rows, or the exit code and the message of an error.
    """

    def end(code: int) -> None:
        raise SystemExit(code)

    def call(path: Path, *more: str) -> list[dict] | tuple[int, str]:
        monkeypatch.setattr(os, "_exit", end)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        words = [*flags(val_only, tmp_path / "logs"), "--evaluate", str(path), *more]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
        try:
            train_imagenet.main()
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return results(capsys.readouterr().out)

    return call


def metrics_of(row: dict) -> list[float]:
    return [row[name] for name in METRICS]


@pytest.mark.mpi
def test_two_ranks_measure_what_their_run_measured(trained, val_only, tmp_path, mpirun):
    """They need no training images, and count each validation image once."""
    path = trained / "checkpoint-1.pth.tar"
    logs = tmp_path / "logs"
    done = mpirun(2, SCRIPT, *flags(val_only, logs), "--evaluate", path)
    assert done.returncode == 0, done.stderr
    found = results(done.stdout)
    assert [row["split"] for row in found] == ["val", "val_ema"]
    recorded = [row for row in rows(trained) if row["split"] != "train"]
    assert [metrics_of(row) for row in found] == [metrics_of(row) for row in recorded]
    assert all(row["images"] == CLASSES * VAL and row["evaluated"] == str(path) for row in found)
    assert all(row["images_per_second"] > 0 for row in found)
    assert f"val loss {found[0]['loss']:.4f} top1" in done.stdout
    assert not logs.exists()


@pytest.mark.mpi
def test_one_rank_measures_the_same_accuracy(trained, evaluated, tmp_path):
    found = evaluated(trained / "checkpoint-1.pth.tar")
    recorded = [row for row in rows(trained) if row["split"] != "train"]
    for mine, theirs in zip(found, recorded, strict=True):
        assert metrics_of(mine)[1:] == metrics_of(theirs)[1:]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    best = max(found, key=lambda row: row["top1"])
    (exported,) = evaluated(trained / "best.safetensors")
    assert metrics_of(exported) == metrics_of(best)
    assert not (tmp_path / "logs").exists()


@pytest.mark.mpi
def test_a_checkpoint_within_an_epoch_has_the_mean_statistics_of_its_ranks(trained, evaluated):
    """The exported weights have them too."""
    found = {row["split"]: row for row in evaluated(trained / "checkpoint-1+1.pth.tar")}
    (exported,) = evaluated(trained / "model.safetensors")
    best = max((row for row in rows(trained) if row["split"] != "train"), key=lambda r: r["top1"])
    assert metrics_of(exported) == metrics_of(found[best["split"]])


@pytest.mark.mpi
def test_a_state_dict_of_another_program_is_measured(trained, evaluated, tmp_path):
    state = safetensors.torch.load_file(trained / "model.safetensors")
    torch.save({"state_dict": {f"module.{n}": v for n, v in state.items()}}, tmp_path / "ddp.pth")
    ours, theirs = evaluated(trained / "model.safetensors"), evaluated(tmp_path / "ddp.pth")
    assert metrics_of(ours[0]) == metrics_of(theirs[0])


def test_a_checkpoint_of_an_earlier_version_is_measured(evaluated):
    (row,) = evaluated(GOLDENS / "old_run" / "checkpoint-1+1.pth.tar")
    assert row["images"] == CLASSES * VAL


def test_unreadable_images_are_left_out_and_reported(evaluated, folders, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(folders / "val", bad)
    (bad / "n00000001" / "2.JPEG").write_text("no image")
    path = GOLDENS / "old_run" / "checkpoint-1+1.pth.tar"
    code, message = evaluated(path, "--val-dir", str(bad))
    assert code == 3
    assert "--on-bad-image skip" in message
    (row,) = evaluated(path, "--val-dir", str(bad), "--on-bad-image", "skip")
    assert row["images"] == CLASSES * VAL - 1


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--model", "resnet18"], 2, ["--model resnet18", "use --model shufflenet_v2_x0_5"]),
        (["--benchmark", "data"], 2, ["--evaluate and --benchmark cannot be used together"]),
        (["--branch", "x"], 2, ["--evaluate and --branch cannot be used together"]),
        (["--evaluate", "/nowhere.pth"], 4, ["--evaluate /nowhere.pth does not exist"]),
        (["--evaluate", "tests"], 4, ["--evaluate tests is a folder", "best.safetensors"]),
        (["--evaluate", "README.md"], 4, ["--evaluate README.md", "not a file of weights"]),
        (["--val-dir", "/nowhere"], 3, ["--val-dir", "/nowhere"]),
    ],
)
def test_what_does_not_fit_is_refused(evaluated, more, code, words):
    stopped, message = evaluated(GOLDENS / "old_run" / "checkpoint-1+1.pth.tar", *more)
    assert stopped == code
    assert all(word in message for word in words), message
    assert "Traceback" not in message


@pytest.mark.mpi
def test_validation_images_of_other_classes_are_refused(trained, evaluated, folders, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folders / "val", other)
    (other / "n00000000").rename(other / "n00000009")
    code, message = evaluated(trained / "best.safetensors", "--val-dir", str(other))
    assert code == 2
    assert "class n00000001 has label 1 in the file, but 0 in the validation images" in message
