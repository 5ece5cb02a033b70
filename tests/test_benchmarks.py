"""The benchmarks run. Their results are not checked."""

from __future__ import annotations

import sys

import pytest

from benchmarks import listing, short_side
from conftest import run


def test_short_side_runs(monkeypatch, capsys):
    monkeypatch.setattr(short_side, "photographs", lambda: short_side.generated(1))
    flags = ["--images", "2", "--rounds", "1", "--short-side", "64"]
    monkeypatch.setattr(sys, "argv", ["short_side", *flags])
    short_side.main()
    printed = capsys.readouterr().out
    assert "generated    training" in printed
    assert printed.count("--short-side 64 --quality 90") == 2


def test_the_cost_of_a_listing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(listing, "_CLASSES", 3)
    monkeypatch.setattr(listing, "_VAL_IMAGES", 3)
    root = str(tmp_path / "images")
    for flags in ([root, "--make", "7"], [root]):
        monkeypatch.setattr(sys, "argv", ["listing", *flags])
        listing.main()
    assert capsys.readouterr().out.startswith("7 + 3 images, ")


@pytest.mark.parametrize("part", ["bare", "pair", "small"])
def test_each_part_of_the_training_benchmark_runs(part):
    module = [sys.executable, "-m", "benchmarks.training", "--part", part, "--steps", "1"]
    done = run(*module, "--model", "resnet18", "--image-size", "32", "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0
