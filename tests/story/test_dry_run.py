"""--dry-run of the training scripts: the same checks as a real run, and no trace of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from conftest import flags, run
from data import DataError
from data.sources.imagenet import ImageNet
from lars import dry_run
from lars.comm.world import World
from lars.config import Config, UsageError, parse
from lars.errors import CheckpointError
from lars.job.interrupt import Interrupt
from lars.job.job import Job
from lars.run.lock import locked

SCRIPT = "train_imagenet.py"


def dry(*argv: str, ranks: int = 1) -> None:
    """What `lars.engine.train` does with --dry-run, in this process."""
    config, source = parse([*argv, "--dry-run"], Config, ImageNet, description="")
    source.check()
    job = Job(Interrupt(()), 0.0)
    job.world = World()
    job.world.size = ranks
    dry_run.run(config, source, job, workers=0)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of each file in a folder, except for the lock."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def line(name: str, text: str) -> str:
    """The row of the summary with this name."""
    (found,) = (row for row in text.splitlines() if row.startswith(f"  {name}  "))
    return found


def test_a_dry_run_prints_the_plan_and_leaves_no_trace(folders, tmp_path, capfd):
    dry(*flags(folders, tmp_path / "logs"), "--images-per-second", "33")
    shown = capfd.readouterr().out
    assert not (tmp_path / "logs").exists()
    assert "33 for training, 15 for validation" in line("images", shown)
    assert "16 = 1 rank x 4 micro-batches x 4 samples" in line("effective batch", shown)
    assert "step 0: 0, step 2: 0.1 (end of warm-up)" in shown
    assert "0.1 |" in shown
    assert "optimizer 1" in line("memory per rank", shown)
    assert "at most 5 at once" in line("checkpoints", shown)
    assert "1 s for an epoch, 4.36 s for the run with 1.36 s of validation" in shown
    assert "nothing was trained or written" in shown.splitlines()[-1]


@pytest.mark.mpi
def test_the_plan_is_the_same_on_real_and_on_planned_ranks(folders, tmp_path, mpirun, capfd):
    common = (*flags(folders, tmp_path / "logs"), "--sync-bn")
    done = mpirun(2, SCRIPT, *common, "--dry-run")
    assert done.returncode == 0, done.stderr
    real = done.stdout
    assert real.count("effective batch") == 1, "only the root prints"
    dry(*common, "--plan-ranks", "2")
    planned = capfd.readouterr().out
    for name in ("effective batch", "BatchNorm", "steps", "exchange", "memory per rank"):
        assert line(name, real) == line(name, planned)
    assert "16 = 2 ranks x 2 micro-batches x 4 samples" in line("effective batch", real)
    assert "statistics over 8 samples" in line("BatchNorm", real)
    assert "Horovod (mpirun started the job)" in line("backend", real)
    assert "\n  backend " not in planned, "one process communicates with no other"
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("more", "ranks", "error", "message"),
    [
        ([], 3, UsageError, "--effective-batch-size 16 is not a multiple"),
        (["--plan-ranks", "3"], 1, UsageError, "--effective-batch-size 16 is not a multiple"),
        (["--plan-ranks", "4"], 2, UsageError, "--plan-ranks 4 is for one process, but this job"),
        (["--model", "resnet51"], 1, UsageError, "--model resnet51 is not known"),
        (["--resume", "nowhere.pth.tar"], 1, CheckpointError, "--resume nowhere.pth.tar"),
        (["--log-dir", "README.md"], 1, CheckpointError, "--log-dir: README.md/run cannot be"),
        (["--val-dir", "nowhere"], 1, DataError, "--val-dir"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(folders, tmp_path, more, ranks, error, message):
    with pytest.raises(error, match=message):
        dry(*flags(folders, tmp_path / "logs", *more), ranks=ranks)
    assert not (tmp_path / "logs").exists()


def test_an_image_that_cannot_be_read_is_found_if_the_first_batches_contain_it(tmp_path):
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            (folder / "1.JPEG").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"1\.JPEG"):
        dry(*flags(tmp_path, tmp_path / "logs"), "--effective-batch-size", "4")


def test_a_dry_run_shows_from_where_the_run_would_continue(folders, tmp_path, capfd):
    words = flags(folders, tmp_path)
    done = run(sys.executable, SCRIPT, *words, "--max-steps", "4")
    assert done.returncode == 0, done.stderr
    before = snapshot(tmp_path)
    with locked(tmp_path / "run"):
        dry(*words, "--images-per-second", "33")
    shown = capfd.readouterr().out
    assert snapshot(tmp_path) == before
    assert "epoch 2, step 1 (4 of 9 steps)" in line("resuming after", shown)
    assert "for the rest of the run" in line("time", shown)
    assert "is in use by process" in shown
    dry(*words)
    assert "is in use" not in capfd.readouterr().out
    with pytest.raises(UsageError, match="belongs to another run: wd was"):
        dry(*words, "--wd", "1")
