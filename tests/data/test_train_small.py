"""experiments/train_small.py trains each kind of small data set with the training loop of the trainer."""

from __future__ import annotations

import json
import sys

import pytest

from conftest import run
from data_fixtures import write_mnist

SCRIPT = "experiments/train_small.py"
LABELS = [i % 10 for i in range(40)]


def flags(logs, *more) -> list[str]:
    return ["--log-dir", str(logs), "--run-name", "run", "--model", "shufflenet_v2_x0_5", "--no-cuda",
            "--batch-size", "16", "--effective-batch-size", "32", "--epochs", "2",
            "--warmup-epochs", "0.5", "--base-lr", "0.05", *more]  # fmt: skip


def rows(logs) -> list[dict]:
    return [json.loads(line) for line in (logs / "run" / "metrics.jsonl").read_text().splitlines()]


def test_noise_is_learned_without_files(tmp_path):
    noise = ["--dataset", "noise", "--image-size", "32", "--num-classes", "2", "--train-size", "320",
             "--val-size", "64"]  # fmt: skip
    done = run(sys.executable, SCRIPT, *noise, *flags(tmp_path), "--workers", "0")
    assert done.returncode == 0, done.stderr
    assert "320 for training, 64 for validation, 2 classes" in done.stdout
    train = [row["loss"] for row in rows(tmp_path) if row["split"] == "train"]
    assert len(train) == 2
    assert train[1] < train[0]


def test_digits_are_the_default_and_some_steps_of_them_can_be_trained(tmp_path):
    done = run(sys.executable, SCRIPT, *flags(tmp_path), "--max-steps", "3", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "1437 for training, 360 for validation, 10 classes" in done.stdout
    assert "stopped after step 3" in done.stdout


@pytest.mark.mpi
def test_mnist_is_trained_on_two_ranks_with_workers(tmp_path, mpirun):
    folder = write_mnist(tmp_path / "mnist", LABELS, LABELS[:10], compress=True)
    done = mpirun(2, SCRIPT, "--dataset", "mnist", "--data-dir", folder, *flags(tmp_path / "logs"),
                  "--workers", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "40 for training, 10 for validation, 10 classes" in done.stdout
    val = [row for row in rows(tmp_path / "logs") if row["split"] == "val"]
    assert [(row["epoch"], row["step"]) for row in val] == [(1, 2), (2, 4)]


def test_missing_files_are_refused_before_training(tmp_path):
    done = run(sys.executable, SCRIPT, "--dataset", "cifar100", *flags(tmp_path))
    assert done.returncode == 3
    assert "--archive: cifar-100-python.tar.gz cannot be read" in done.stderr


@pytest.mark.parametrize(
    ("dataset", "flag"),
    [("cifar10", "--archive"), ("cifar100", "--archive"), ("tiny-imagenet", "--train-parquet"),
     ("mnist", "--data-dir"), ("digits", "--padding"), ("noise", "--num-classes")],
)  # fmt: skip
def test_help_shows_the_flags_of_the_data_set(dataset, flag):
    done = run(sys.executable, SCRIPT, "--dataset", dataset, "--help")
    assert done.returncode == 0
    assert f"\n  {flag}" in done.stdout
    assert "\n  --base-op" in done.stdout


def test_an_unknown_data_set_is_refused_with_the_known_ones():
    done = run(sys.executable, SCRIPT, "--dataset", "imagenet21k")
    assert done.returncode == 2
    assert "invalid choice: 'imagenet21k' (choose from 'cifar10', 'cifar100'," in done.stderr


def test_a_data_set_in_a_recipe_is_not_ignored(tmp_path):
    (tmp_path / "noise.args").write_text("--dataset noise\n")
    done = run(sys.executable, SCRIPT, f"@{tmp_path}/noise.args", *flags(tmp_path))
    assert done.returncode == 2
    assert "--dataset noise is in a recipe; give it on the command line" in done.stderr
