"""The benchmarks run, and the page of all benchmarks has their results."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import __main__ as program
from benchmarks import buckets, listing, loader, plot_augmentation, short_side, training, transforms
from benchmarks import page as pages
from benchmarks.rounds import Comparison, Row, Suite, alone, in_turn
from benchmarks.suites import compute, files, ranks
from conftest import ROOT, ranks_of, run
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
    monkeypatch.setattr(sys, "argv", ["listing", root, "--make", "7"])
    with pytest.raises(SystemExit, match="2"):
        listing.main()
    assert "error: --make 7: [Errno 17] File exists" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["bare", "pair", "observed", "small"])
def test_each_part_of_the_training_benchmark_runs(part):
    module = [sys.executable, "-m", "benchmarks.training", "--part", part, "--steps", "1"]
    done = run(*module, "--model", "resnet18", "--image-size", "32", "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0


@pytest.mark.parametrize("horovod", [True, False])
def test_two_ranks_are_compared_with_two_bare_loops(monkeypatch, capsys, horovod):
    """Without Horovod, its rows are left out."""
    monkeypatch.setattr(training, "mpirun", lambda ranks: ["mpirun"] * horovod)
    monkeypatch.setattr(training, "speeds", lambda *commands: 4.0 * len(commands))
    training.measure(
        argparse.Namespace(rounds=2, steps=1, model="resnet18", image_size=32, batch_size=2)
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trainer, 2")]
    assert len(lines) == (3 if horovod else 1)
    assert all(line.endswith("0.500 (0.50 to 0.50) x two bare loops") for line in lines)


def test_every_augmentation_is_measured_beside_torchvisions():
    file = io.BytesIO()
    Image.fromarray(photograph(60, 80, seed=0)).save(file, "JPEG")
    for name in transforms.AUGMENTATIONS:
        variants = transforms.augmentation_variants([file.getvalue()] * 2, name)
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


# ------------------------------------------------------------------- all benchmarks in one page


def fake(unit: str = "ms", **options) -> Suite:
    """A suite with a reference, a candidate of twice its value, and a package that is missing."""

    @contextlib.contextmanager
    def prepare(folder, flags):
        rows = [Row("base", "base"), Row("other", "base"), Row("peer", "base", "timm")]
        yield Comparison(rows, [alone("base", lambda: 2.0), alone("other", lambda: 4.0)])

    return Suite("optimizer", "Fake", "About {files:,} files.", unit, prepare, **options)


def together(monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, words)])
    program.main()


def test_turns_are_taken_round_by_round():
    taken: list[str] = []
    turns = [
        alone(name, lambda name=name: float(len(taken.append(name) or taken))) for name in "ab"
    ]
    assert in_turn(turns, 2) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert taken == list("ababab")
    assert in_turn(turns, 9, seconds=0, least=4, warm_up=False)["a"] == [7.0, 9.0, 11.0, 13.0]


@pytest.mark.parametrize(("unit", "ratio"), [("ms", 0.5), ("images/s", 2.0)])
def test_a_ratio_larger_than_one_is_faster(monkeypatch, capsys, tmp_path, unit, ratio):
    monkeypatch.setattr(program, "suites", lambda: [fake(unit)])
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin all -->\nold\n<!-- end all -->\nafter\n")
    together(monkeypatch, "--quick", "--out", tmp_path / "new/all", "--into", page)
    (suite,) = json.loads((tmp_path / "new/all.json").read_text())["suites"]
    base, other, peer = suite["rows"]
    assert (base["ratio"], other["ratio"], other["median"]) == (1, ratio, 4)
    assert "median" not in peer
    text = (tmp_path / "new/all.md").read_text()
    assert f"| other | 4 | {ratio:.2f} ({ratio:.2f} to {ratio:.2f}) x base |" in text
    assert "| peer | timm is not installed |" in text
    assert "About 20,000 files." in text
    assert text in capsys.readouterr().out
    written = page.read_text()
    assert written.startswith("before\n<!-- begin all -->\n\n`python -m benchmarks --quick")
    assert written.endswith("<!-- end all -->\nafter\n")
    assert "old" not in written


def test_quick_leaves_long_suites_out_unless_they_are_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(program, "suites", lambda: [fake(quick=False)])
    together(monkeypatch, "--quick", "--list")
    assert capsys.readouterr().out == ""
    together(monkeypatch, "--quick", "--list", "--only", "optimizer", "--files", 5000)
    assert "About 5,000 files." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "speed"], "--only speed: there is no such table; choose from optimizer"),
        (["--files", "5"], "--files 5: use at least 1000"),
        (["--into", "missing.md"], "--into missing.md: "),
        (["--into", "README.md"], "--into README.md: it needs the lines <!-- begin benchmarks -->"),
        (["--out", "README.md/all"], "--out README.md/all: cannot write there"),
    ],
)
def test_wrong_flags_are_explained_before_time_is_spent(monkeypatch, capsys, words, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        together(monkeypatch, *words)
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", [path.stem for path in (ROOT / "benchmarks/results").glob("*.json")]
)
def test_the_page_about_performance_holds_what_the_command_wrote(name):
    results = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    page = (ROOT / "docs/performance.md").read_text()
    assert page == pages.insert(page, name, pages.markdown(results))
    known = {suite.name: suite.title for suite in program.suites()}
    assert all(known[suite["name"]] == suite["title"] for suite in results["suites"])


def test_the_names_of_the_suites_are_those_of_the_help():
    assert [suite.name for suite in program.suites()] == list(program.NAMES)


def test_each_suite_in_this_process_runs(monkeypatch, tmp_path):
    """Every row has a value, unless its package is missing."""
    small = argparse.Namespace(model="resnet18", image_size=32, batch_size=2)
    monkeypatch.setattr(compute, "SHAPE", small)
    monkeypatch.setattr(compute.optimizer, "shapes_of", lambda net: [(5, 2), (5,)])
    monkeypatch.setattr(files, "IMAGES", loader.BATCH)
    content = {part: {"w": torch.ones(3)} for part in ("model", "optimizer")}
    monkeypatch.setattr(files, "state", lambda: content)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(listing, "_CLASSES", 3)
    monkeypatch.setattr(listing, "_VAL_IMAGES", 3)
    options = argparse.Namespace(files=7)
    for name in ("optimizer", "step", "validation", "observers", "loader", "checkpoint", "listing"):
        suite = next(suite for suite in program.suites() if suite.name == name)
        folder = tmp_path / name
        folder.mkdir()
        with suite.prepare(folder, options) as compared:
            values = in_turn(compared.turns, 1, warm_up=False)
        rows = {row.name for row in compared.rows}
        assert {row.against for row in compared.rows} <= rows
        assert set(values) == {row.name for row in compared.rows if not row.lacks}, name


def test_the_requests_of_a_rank_are_counted(monkeypatch, tmp_path):
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    monkeypatch.setattr(listing, "_CLASSES", 3)
    monkeypatch.setattr(listing, "_VAL_IMAGES", 3)
    root = str(tmp_path / "tree")
    listing.make(root, 7)
    (requests,) = files.requests_of(root, 1)
    assert 2 * 3 < requests < 200


def test_the_requests_of_other_ranks_are_not_understated(monkeypatch, tmp_path):
    """Each row has the largest number of the ranks that it describes."""
    for ranks_, first, later in ((4, [5, 90, 8, 6], [2, 3, 1, 1]), (1, [90], [3])):
        answers = iter([first, later])
        monkeypatch.setattr(
            files, "requests_of", lambda root, ranks, answers=answers: next(answers)
        )
        found = files.count_requests({n: n for n in files.RANKS}, tmp_path / "cache", "", ranks_)
        assert list(found.values()) == [90, 8 if ranks_ > 1 else 90, 3]


def test_a_row_says_that_dali_is_missing_beside_other_packages_of_nvidia(monkeypatch, tmp_path):
    """CUDA builds of torch install the package `nvidia` without DALI."""
    monkeypatch.setattr(files, "make_images", lambda folder: [])
    monkeypatch.setattr(loader, "source_variants", lambda folder, workers: {"folders": lambda: 1})
    with files.transforms(tmp_path, argparse.Namespace()) as compared:
        lacks = {row.name: row.lacks for row in compared.rows}
    assert lacks["epoch: records through DALI"] == "NVIDIA DALI"
    assert lacks["epoch: folders"] == ""


def test_a_job_of_ranks_gives_the_median_of_its_rounds(monkeypatch):
    printed = "a message\n" + json.dumps({ranks.OURS: [1.0, 2.0, 5.0, 4.0]})
    monkeypatch.setattr(ranks, "finish", lambda command: printed)
    assert ranks.job([], "torch") == {f"{ranks.OURS} (torch)": 3.0}


@pytest.mark.mpi
def test_ranks_are_measured_beside_their_peers():
    shape = ["--model", "resnet18", "--image-size", "32", "--batch-size", "2", "--rounds", "1"]
    for engine in ("torch", "horovod"):
        done = ranks_of(engine)(2, "-m", "benchmarks.suites.ranks", engine, *shape)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.strip().splitlines()[-1])
        peer = ranks.PEER.format(ranks.PEERS[engine])
        assert set(found) == {ranks.OURS, ranks.EACH, ranks.TRAINING, peer}
