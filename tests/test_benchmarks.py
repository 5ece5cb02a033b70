"""The benchmarks run. Their results are not checked."""

from __future__ import annotations

import sys

import pytest

from benchmarks import buckets, short_side
from conftest import run


def test_short_side_runs(monkeypatch, capsys):
    monkeypatch.setattr(short_side, "photographs", lambda: short_side.generated(1))
    flags = ["--images", "2", "--rounds", "1", "--short-side", "64"]
    monkeypatch.setattr(sys, "argv", ["short_side", *flags])
    short_side.main()
    printed = capsys.readouterr().out
    assert "generated    training" in printed
    assert printed.count("--short-side 64 --quality 90") == 2


@pytest.mark.parametrize("part", ["bare", "pair", "small"])
def test_each_part_of_the_training_benchmark_runs(part):
    module = [sys.executable, "-m", "benchmarks.training", "--part", part, "--steps", "1"]
    done = run(*module, "--model", "resnet18", "--image-size", "32", "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0


def test_bucket_sizes_are_compared(monkeypatch, capsys):
    flags = ["--mib", "1", "4", "--rounds", "1", "--model", "resnet18"]
    monkeypatch.setattr(sys, "argv", ["buckets", *flags, "--image-size", "32", "--batch-size", "2"])
    buckets.main()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == [
        f"{what}, {mib} MiB" for what in ("exchange", "forward and backward") for mib in (1, 4)
    ]
