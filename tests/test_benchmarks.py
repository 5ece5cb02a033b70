"""The benchmarks run. Their results are not checked."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import buckets, listing, loader, plot_augmentation, short_side
from conftest import run
from data_fixtures import photograph


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


def test_every_augmentation_is_measured_beside_torchvisions():
    file = io.BytesIO()
    Image.fromarray(photograph(60, 80, seed=0)).save(file, "JPEG")
    for name in loader.AUGMENTATIONS:
        variants = loader.augmentation_variants([file.getvalue()] * 2, name)
        assert len(variants) == 4
        assert [run() for run in variants.values()] == [2] * 4


def test_the_figure_of_the_augmentations_can_be_drawn():
    picture = np.asarray(plot_augmentation.sheet())
    step = plot_augmentation.SIDE + plot_augmentation.GAP
    rows = [picture[i * step : (i + 1) * step] for i in range(len(plot_augmentation.ROWS))]
    for row in rows[1:]:
        assert (row != rows[0]).mean() > 0.1
    assert (rows[-1] == (124, 116, 104)).all(-1).mean() > 0.02  # erased


def test_bucket_sizes_are_compared(monkeypatch, capsys):
    flags = ["--mib", "1", "4", "--rounds", "1", "--model", "resnet18"]
    monkeypatch.setattr(sys, "argv", ["buckets", *flags, "--image-size", "32", "--batch-size", "2"])
    buckets.main()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == [
        f"{what}, {mib} MiB" for what in ("exchange", "forward and backward") for mib in (1, 4)
    ]
