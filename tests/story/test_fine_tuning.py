"""Fine-tuning: ``--init`` and ``--freeze-backbone`` on one rank and on two, resumed after the file is gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from run_folders import end_of, summary_of

import train_imagenet
from conftest import GOLDENS, ROOT, flags
from lars.run import checkpoint

SCRIPT = ROOT / "train_imagenet.py"
START = GOLDENS / "old_run" / "checkpoint-1+1.pth.tar"
FLAGS = ("--freeze-backbone", "--ema-decay", "0.5", "--epochs", "1")


@pytest.fixture
def trained(folders, tmp_path, monkeypatch, capsys):
    """``trained(*flags)`` trains on one rank in this process. It returns the output, or an error's code and message."""

    def end(code: int) -> None:
        raise SystemExit(code)

    def call(*more: str) -> str | tuple[int, str]:
        monkeypatch.setattr(os, "_exit", end)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.setattr(
            sys, "argv", [str(SCRIPT), *flags(folders, tmp_path), *map(str, (*FLAGS, *more))]
        )
        try:
            train_imagenet.main()
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return capsys.readouterr().out

    return call


def test_a_fine_tuning_resumes_exactly_without_its_file(trained, tmp_path):
    start = tmp_path / "start.pth.tar"
    shutil.copy(START, start)
    trained("--init", start, "--run-name", "straight")
    first = trained("--init", start, "--max-steps", "1")
    assert f"started with     {start}, SHA-256" in first
    assert "of which 3,075 are trained" in first
    start.unlink()
    second = trained("--init", start)
    assert "resuming after" in second
    assert end_of(tmp_path / "run") == end_of(tmp_path / "straight")
    record = json.loads((tmp_path / "run" / "config.json").read_text())["init"]
    assert record == summary_of(tmp_path / "run")["init"]
    assert (record["from"], len(record["sha256"]), record["new_heads"]) == (str(start), 64, [])
    backbone_is_that_of_the_file(tmp_path / "run")
    code, message = trained()
    assert code == 2
    assert "belongs to another run: init was" in message
    code, message = trained("--init", start, "--run-name", "new")
    assert code == 4
    assert f"--init {start} does not exist" in message


def backbone_is_that_of_the_file(folder: Path) -> None:
    """All tensors but the head are those of the file: weights and BatchNorm statistics."""
    state = checkpoint.load(folder / "checkpoint-1.pth.tar")["learner"]
    theirs = checkpoint.load(START)["learner"]["model"]
    parameters = [name for name in theirs if name.endswith(("weight", "bias"))]
    for network in (state["model"], {n.removeprefix("module."): v for n, v in state["average"].items()}):  # fmt: skip
        changed = {name for name in parameters if not torch.equal(network[name], theirs[name])}
        assert changed == {"fc.weight", "fc.bias"}


@pytest.mark.mpi
def test_two_ranks_start_with_the_weights_of_the_file(folders, tmp_path, mpirun):
    words = [*flags(folders, tmp_path), *FLAGS, "--init", START]
    done = mpirun(2, SCRIPT, *words)
    assert done.returncode == 0, done.stderr
    backbone_is_that_of_the_file(tmp_path / "run")
