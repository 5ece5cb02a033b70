"""The run folder: its lock, the checkpoint to resume from, a full disk, and ranks that must agree."""

from __future__ import annotations

import json
import resource
import signal
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import safetensors.torch
import torch
from run_folders import rows, scalars

from conftest import CLASSES, ROOT
from conftest import run as run_command
from lars.comm.world import World
from lars.config import Config, UsageError
from lars.config.plan import make_plan
from lars.errors import CheckpointError, NonFiniteError, Preempted
from lars.learner.classification import Classification
from lars.learner.learner import StepResult
from lars.observe.log import RunLog
from lars.observe.observer import Training
from lars.run import checkpoint, identity, lock, resume
from lars.run.agreement import check_ranks_agree
from lars.run.folder import Run
from lars.run.lock import locked
from lars.run.progress import Progress
from lars.run.resume import LoadedCheckpoint, same_effective_batch


def save(path: Path, **more) -> Path:
    """Write a checkpoint without weights."""
    path.parent.mkdir(exist_ok=True)
    parts = {"learner": {}, "progress": {}, "ranks": None, "same_run": {}, "said": {}}
    checkpoint.save(path, parts | more)
    return path


def found(folder: Path, **flags) -> str | None:
    """The name of the checkpoint from which a run in `folder` resumes."""
    result = resume.find_checkpoint(Config(**flags), folder, World())
    return result and Path(result.path).name


def test_the_default_folder_name_follows_from_the_flags():
    config = Config(batch_size=64, batches_per_allreduce=2, base_lr=0.5, lr_scaling="linear")
    assert identity.run_name(config) == "resnet50_sgd_bs64x2_lr0.5-linear_wd5e-05_ep90_seed42"
    config = Config(effective_batch_size=1024)
    assert identity.run_name(config) == "resnet50_sgd_ebs1024_lr0.0125_wd5e-05_ep90_seed42"


def test_two_jobs_cannot_use_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0.1)
    in_use = pytest.raises(UsageError, match=r"--run-name: .*run is in use by process \d+ on ")
    with locked(tmp_path / "run"), in_use:
        locked(tmp_path / "run").__enter__()
    with locked(tmp_path / "run"):
        pass


def test_a_job_that_waits_for_a_folder_can_be_stopped(tmp_path):
    def stop() -> None:
        raise Preempted("stopped on request")

    with locked(tmp_path / "run"), pytest.raises(Preempted):
        locked(tmp_path / "run", stop).__enter__()


def test_an_error_about_a_folder_that_cannot_be_created_names_the_flag(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(CheckpointError, match=f"--log-dir: {folder} cannot be written"):
            locked(folder).__enter__()


def test_the_path_of_resume_applies_until_the_folder_has_its_own_checkpoints(tmp_path, capsys):
    other = str(save(tmp_path / "checkpoint-7.pth.tar"))
    folder = tmp_path / "run"
    assert found(folder, resume=other) == "checkpoint-7.pth.tar"
    save(folder / "checkpoint-8.pth.tar")
    assert found(folder, resume=other) == "checkpoint-8.pth.tar"
    assert f"--resume {other} is ignored" in capsys.readouterr().out


def test_a_resumed_run_needs_no_more_memory_than_a_new_one(tmp_path):
    done = run_command(sys.executable, ROOT / "tests" / "ranks" / "resumed_memory.py", tmp_path)
    assert done.returncode == 0, done.stderr
    fresh, resumed = map(int, done.stdout.split()[1:])
    assert resumed < 1.1 * fresh, "a checkpoint of AlexNet has 490 MB"


@pytest.mark.parametrize("flag", ["resume", "branch"])
def test_the_error_says_what_a_file_is_that_is_not_a_checkpoint(tmp_path, flag):
    weights = {"conv.weight": torch.zeros(2)}
    torch.save(weights, tmp_path / "resnet18.pth")
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "timm.pth.tar")
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    for name, words in {
        "resnet18.pth": "holds only weights, but .* of this trainer",
        "timm.pth.tar": "written by another program",
        "model.safetensors": "holds only weights, but .* checkpoint-",
    }.items():
        path = tmp_path / name
        with pytest.raises(CheckpointError, match=f"--{flag} {path}: .*{words}"):
            found(tmp_path / "run", **{flag: str(path)})


def test_an_intact_file_that_is_not_a_checkpoint_is_skipped(tmp_path, capsys):
    save(tmp_path / "run/checkpoint-1.pth.tar")
    checkpoint.save(tmp_path / "run/checkpoint-2.pth.tar", {"weights": 1})
    assert found(tmp_path / "run") == "checkpoint-1.pth.tar"
    assert "checkpoint-2.pth.tar cannot be used: not a checkpoint" in capsys.readouterr().out


def test_a_different_checkpoint_format_is_refused_in_a_used_folder(tmp_path):
    save(tmp_path / "checkpoint-1.pth.tar")
    flags = {"checkpoint_format": Config.checkpoint_format}
    (tmp_path / "config.json").write_text(json.dumps({"flags": flags}))
    with pytest.raises(UsageError, match=r"--checkpoint-format x-\{epoch\}: .* are named check"):
        found(tmp_path, checkpoint_format="x-{epoch}")


def plan(config: Config, size: int):
    return make_plan(config, size=size, train_size=1000)


def checkpoint_of(config: Config, size: int) -> LoadedCheckpoint:
    """The part of the checkpoint of a run on `size` ranks that concerns its batch size."""
    flags = {
        name: getattr(config, name) for name in ("effective_batch_size", "batches_per_allreduce")
    }
    batch = {"effective_batch_size": plan(config, size).effective_batch_size}
    return LoadedCheckpoint("x.pth", {"same_run": batch, "said": {"flags": flags}})


def test_a_different_number_of_ranks_keeps_the_effective_batch_size():
    config = Config(batch_size=4, batches_per_allreduce=2)
    kept = same_effective_batch(config, plan(config, 2), checkpoint_of(config, 8))
    assert (kept.effective_batch_size, kept.accumulation) == (64, 8)


@pytest.mark.parametrize(
    ("before", "now", "size", "message"),
    [
        ({}, {}, 3, r"x\.pth .* steps of 64 samples, which 3 ranks .* numbers of ranks: 1, 2, 4, 8, 16$"),
        ({}, {"batches_per_allreduce": 4}, 2, "--batches-per-allreduce 4: .* with 2"),
        ({}, {"effective_batch_size": 32}, 2, "--effective-batch-size 32: .* with None"),
    ],
)  # fmt: skip
def test_an_effective_batch_size_that_cannot_be_kept_is_refused(before, now, size, message):
    base = {"batch_size": 4, "batches_per_allreduce": 2}
    earlier = checkpoint_of(Config(**base | before), 8)
    config = Config(**base | {"batches_per_allreduce": 1} | now) if now else Config(**base)
    with pytest.raises(UsageError, match=message):
        same_effective_batch(config, plan(config, size), earlier)


@pytest.fixture
def full_disk():
    """``full_disk(bytes)`` limits the size of files that are written. None removes the limit."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        soft = resource.RLIM_INFINITY if size is None else size
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, ignored)


@dataclass(frozen=True)
class Source:
    train_dir: str = field(default="x", metadata={"same_run": False})
    on_bad_image: str = field(default="error", metadata={"same_run": False, "choices": ("error",)})
    train_size, val_size, num_classes, fingerprint = 33, 15, CLASSES, "ab-cd"
    class_names = ()


def training_in(folder: Path, *history: dict) -> Training:
    """A training at step 1 whose run folder is `folder`."""
    config = Config(log_dir=str(folder.parent), run_name=folder.name)
    learner = types.SimpleNamespace(task=Classification(), lr_at=lambda step: 0.1)
    progress = Progress(step=1, history=list(history))
    return Training(config, Source(), Run(config, Source(), World()), learner, progress)


def val_row(step: int, loss: float) -> dict:
    metrics = {"loss": loss, "top1": 50.0, "top5": 100.0}
    return {"split": "val", "epoch": step, "step": step, "lr": 0.1, "seconds": 1.0, **metrics}


def train_row(step: int) -> dict:
    return val_row(step, 1.0) | {"split": "train"}


def test_records_that_do_not_fit_on_a_full_disk_are_written_later(tmp_path, full_disk, capsys):
    training = training_in(tmp_path, val_row(1, 1.0))
    log, history = RunLog(training), training.progress.history
    log.start()
    size = (tmp_path / "config.json").stat().st_size
    full_disk(size // 20)
    for step in (2, 3, 4):
        history += [train_row(step), val_row(step, step / 8)]
        log.validated()
    printed = capsys.readouterr().out
    assert printed.count("metrics.jsonl cannot be written") == printed.count("tfevents") == 1
    assert all(row["step"] < 4 for row in rows(tmp_path)), "only complete lines"
    full_disk(None)
    log.saved()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 2, 3, 3, 4, 4]
    assert scalars(tmp_path)["val/loss"] == [(2, 0.25), (3, 0.375), (4, 0.5)]


def test_a_row_with_nonfinite_values_is_valid_json(tmp_path):
    training = training_in(tmp_path, val_row(1, float("nan")))
    log = RunLog(training)
    log.start()
    training.progress.history += [train_row(2), val_row(2, float("inf"))]
    log.validated()
    assert [row["loss"] for row in rows(tmp_path)] == [None, 1.0, None]


def test_bad_images_accumulate(tmp_path):
    training = training_in(tmp_path)
    for names in (["b", "a"], [], ["c", "a"]):
        loader = types.SimpleNamespace(bad_images=names)
        training.run.collect_bad_images(training.progress, loader)
    assert training.progress.bad_images == ["a", "b", "c"]
    assert json.loads((tmp_path / "bad_images.json").read_text()) == ["a", "b", "c"]


class Pair(World):
    """A world of two ranks. `other` lists the values that differ on rank 1."""

    def __init__(self, **other) -> None:
        self.other = other

    def all_gather_object(self, value, name):
        return [value, value | self.other]


@pytest.mark.parametrize(
    "name",
    [
        "log_every",
        "checkpoint_steps",
        "max_steps",
        "code",
        "on_bad_image",
        "device",
        "optimizer_path",
    ],
)
def test_ranks_that_differ_are_refused(name):
    with pytest.raises(UsageError, match=f"rank 1 has {name} = 7, but rank 0 has"):
        check_ranks_agree(Pair(**{name: 7}), Config(), Source())
    check_ranks_agree(Pair(), Config(), Source())


def test_paths_and_workers_may_differ_between_ranks():
    compared = identity.same_on_all_ranks(Config(), Source())
    assert compared.keys() & {"train_dir", "log_dir", "workers", "single_threaded"} == set()


def test_the_hash_of_the_code_covers_the_package_of_the_source(tmp_path, monkeypatch):
    """The package may be anywhere."""
    package = tmp_path / "elsewhere"
    package.mkdir()
    (package / "__init__.py").write_text("class Source: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import elsewhere

    before = identity.versions(elsewhere.Source())["code"]
    for name in ("more.py", "kernels.c"):
        (package / name).touch()
        assert identity.versions(elsewhere.Source())["code"] == before
        (package / name).write_text("changed = True\n")
        after = identity.versions(elsewhere.Source())["code"]
        assert after != before
        before = after


def test_skipped_steps_end_the_job_only_if_they_are_nonfinite():
    progress = Progress()
    for number in range(20):
        unreadable = StepResult(taken=False, stop=False, save=False, cause="none could be read")
        progress.advance(unreadable)
        progress.refuse_divergence(unreadable, 2)
        assert (progress.skipped, progress.skipped_in_a_row) == (number + 1, 0)
    nonfinite = unreadable._replace(nonfinite=True, cause="not finite, first in fc.weight")
    progress.advance(nonfinite)
    progress.refuse_divergence(nonfinite, 2)
    progress.advance(nonfinite)
    with pytest.raises(NonFiniteError, match="2 steps in a row were not finite, first in"):
        progress.refuse_divergence(nonfinite, 2)


def test_a_step_that_is_taken_resets_the_count_of_skipped_steps():
    progress, skipped = Progress(), StepResult(False, False, False, nonfinite=True, cause="nan")
    progress.advance(skipped)
    progress.advance(StepResult(taken=True, stop=False, save=False))
    progress.advance(skipped)
    assert (progress.step, progress.skipped, progress.skipped_in_a_row) == (3, 2, 1)


def test_an_old_checkpoint_has_the_defaults_of_newer_flags():
    loaded = LoadedCheckpoint("x.pth", {"same_run": {"wd": 0.1}})
    mine, defaults = {"wd": 0.1, "new_flag": 3}, {"wd": 0.5, "new_flag": 3}
    resume.refuse_another_run(loaded, resume.changes(loaded, mine, defaults))
    with pytest.raises(UsageError, match="new_flag was 3 and is 4"):
        resume.refuse_another_run(loaded, resume.changes(loaded, mine | {"new_flag": 4}, defaults))


def test_a_new_run_counts_as_many_metrics_as_its_task_has():
    progress = Progress.starting(torch.zeros(6, dtype=torch.float64))
    assert progress.totals.shape == progress.window.shape == (6,)
    progress.totals += torch.ones(6, dtype=torch.float64)
    assert progress.window.sum() == 0


def test_a_validation_without_a_readable_image_is_never_the_best():
    progress = Progress(history=[val_row(3, 1.0) | {"top1": float("nan")}, val_row(6, 1.0)])
    assert progress.best() == progress.history[1]


def test_rows_wait_for_the_checkpoint_of_their_epoch(tmp_path):
    """A run whose first checkpoint could not be written must be able to start again."""
    training = training_in(tmp_path)
    log = RunLog(training)
    log.start()
    training.progress.history += [train_row(3), val_row(3, 1.0)]
    training.run.failed_writes = 1
    log.saved()
    log.validated()
    assert rows(tmp_path) == []
    training.run.failed_writes = 0
    log.saved()
    assert [row["split"] for row in rows(tmp_path)] == ["train", "val"]


def test_half_a_validation_does_not_count(tmp_path):
    """The job was killed between the rows of the network and of its average."""
    run = training_in(tmp_path).run
    row = {"split": "val", "step": 3, "top1": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert run._logged_validation(3, {"val", "val_ema"}) == []
    assert run._logged_validation(3, {"val"}) == [row]
    assert run._logged_validation(4, {"val"}) == []


def test_an_average_of_before_its_warmup_keeps_its_rule():
    with_average = Config(ema_decay=0.9)
    assert identity.defaults(with_average, Source())["ema_warmup"] is False
    assert identity.defaults(Config(), Source())["ema_warmup"] is True


def branch_from(path: Path, folder: Path) -> Exception | LoadedCheckpoint | None:
    config = Config(branch=str(path))
    try:
        return resume.find_checkpoint(config, folder, World())
    except (UsageError, CheckpointError) as error:
        return error


def test_a_branch_starts_from_its_file_again_until_it_has_its_own_checkpoints(tmp_path):
    rows = [{"split": "val", "epoch": 1, "step": 3, "top1": 1.0}]
    old = save(tmp_path / "old/checkpoint-1.pth.tar", progress={"history": rows})
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    begun = branch_from(old, folder)
    assert begun.is_branch, "its log holds nothing but the history of the checkpoint"
    own = {"branch": {"from": str(old)}}
    save(folder / "checkpoint-2.pth.tar", progress=own)
    resumed = branch_from(old, folder)
    assert (Path(resumed.path).name, resumed.is_branch) == ("checkpoint-2.pth.tar", False)


def test_a_branch_does_not_take_over_another_run(tmp_path):
    old = save(tmp_path / "old/checkpoint-1.pth.tar")
    assert "a branch must not continue the run" in str(branch_from(old, tmp_path / "old"))
    save(tmp_path / "scratch/checkpoint-1.pth.tar")
    message = str(branch_from(old, tmp_path / "scratch"))
    assert "has checkpoints of another run; choose another --run-name" in message
