"""experiments/barlow_twins.py as a user runs it: both stages, on several ranks, and stopped in between."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from run_folders import end_of, rows, scalars, tensors

from conftest import run
from data_fixtures import write_mnist
from lars.run import checkpoint

SCRIPT = "experiments/barlow_twins.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """MNIST's files with few images. A pretraining has steps of 16, 16 and 5 images."""
    labels = [i % 10 for i in range(37)]
    return write_mnist(tmp_path_factory.mktemp("images") / "mnist", labels, labels[:9])


def flags(images, logs, *more) -> list[str]:
    return ["--dataset", "mnist", "--data-dir", str(images), "--log-dir", str(logs), "--run-name", "run",
            "--model", "small_cnn_bn", "--projector", "16-8", "--no-cuda", "--workers", "0",
            "--batch-size", "4", "--effective-batch-size", "16", "--epochs", "2", "--warmup-epochs", "0.5",
            "--log-every", "1", "--linear-epochs", "2", "--linear-batch-size", "64", *more]  # fmt: skip


@pytest.mark.mpi
def test_both_stages_run_in_one_job_of_two_ranks(images, tmp_path, mpirun):
    # The worker processes of the first stage serve the second one too, because MPI does not survive a fork.
    done = mpirun(2, SCRIPT, *flags(images, tmp_path, "--workers", "1"), timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished: val") == 2
    assert "statistics over 8 samples" in done.stdout
    train, val = rows(tmp_path / "run")[-2:]
    assert (train["split"], val["split"], val["epoch"]) == ("train", "val", 2)
    assert train.keys() >= {"loss", "correlation"}
    assert "val/correlation" in scalars(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["flags"]["projector"] == "16-8"
    assert rows(tmp_path / "run-linear")[-1].keys() >= {"top1", "top5"}


def test_a_run_that_was_stopped_ends_like_one_that_was_not(images, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    first = run(sys.executable, SCRIPT, *flags(images, whole))
    assert first.returncode == 0, first.stderr
    part = flags(images, stopped, "--max-steps", "4", "--stage", "pretraining")
    assert run(sys.executable, SCRIPT, *part).returncode == 0
    assert not (stopped / "run-linear").exists()
    rest = run(sys.executable, SCRIPT, *flags(images, stopped))
    assert rest.returncode == 0, rest.stderr
    assert "resuming after" in rest.stdout
    assert scalars(whole / "run") == scalars(stopped / "run")
    for name in ("run", "run-linear"):
        assert end_of(whole / name) == end_of(stopped / name)
        ours, theirs = (
            checkpoint.load(f / name / "checkpoint-2.pth.tar") for f in (whole, stopped)
        )
        pairs = zip(tensors(ours["learner"]), tensors(theirs["learner"]), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)


def test_a_linear_evaluation_belongs_to_its_pretraining(images, tmp_path):
    missing = run(sys.executable, SCRIPT, *flags(images, tmp_path, "--stage", "linear"))
    assert missing.returncode == 2
    assert "run --stage pretraining first" in missing.stderr


def test_a_data_set_without_two_views_is_refused():
    done = run(sys.executable, SCRIPT, "--dataset", "noise")
    assert done.returncode == 2
    assert "--dataset noise has no two views" in done.stderr


def test_the_help_names_the_flags_and_loads_no_torch():
    done = run(sys.executable, "-X", "importtime", SCRIPT, "--help")
    assert done.returncode == 0
    for name in (
        "--projector",
        "--btlmbda X, --lambda",
        "--cl-epochs",
        "--stage",
        "--lr-classifier",
    ):
        assert name in done.stdout
    modules = {line.rsplit("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "torchvision", "numpy", "safetensors"} & modules


@pytest.mark.parametrize(
    ("more", "words"),
    [(["--benchmark", "data", "--max-steps", "2"], "images/s"), (["--dry-run"], "dry run")],
)
def test_the_pretraining_is_measured_or_planned_without_files(images, tmp_path, more, words):
    done = run(sys.executable, SCRIPT, *flags(images, tmp_path, *more))
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
    assert not list(tmp_path.iterdir())
