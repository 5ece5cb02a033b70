"""The run folder: who may write into it, what is found in it, and what a full disk costs."""

from __future__ import annotations

import json
import resource
import signal
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from run_folders import rows, scalars

from conftest import CLASSES
from lars import checkpoint, engine, run
from lars.checkpoint import CheckpointError
from lars.comm import World
from lars.config import Config, UsageError, of_all_ranks
from lars.interrupt import Preempted
from lars.logs import RunLog, Silence
from lars.plan import make_plan
from lars.run import Found, Progress


def save(path: Path, **more) -> Path:
    """A checkpoint in all but the weights."""
    path.parent.mkdir(exist_ok=True)
    parts = {"learner": {}, "progress": {}, "ranks": None, "same_run": {}, "said": {}}
    checkpoint.save(path, parts | more)
    return path


def found(folder: Path, **said) -> str | None:
    """The name of the checkpoint that a run in `folder` goes on from."""
    result = run.find(Config(**said), folder, World())
    return result and Path(result.path).name


def test_the_default_folder_is_found_again_on_any_number_of_ranks():
    said = Config(batch_size=64, batches_per_allreduce=2, base_lr=0.5, lr_scaling="linear")
    assert run.run_name(said) == "resnet50_sgd_bs64x2_lr0.5-linear_wd5e-05_ep90_seed42"
    said = Config(effective_batch_size=1024)
    assert run.run_name(said) == "resnet50_sgd_ebs1024_lr0.0125_wd5e-05_ep90_seed42"


def test_two_jobs_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_LOCK_SECONDS", 0.1)
    in_use = pytest.raises(UsageError, match=r"--run-name: .*run is in use by process \d+ on ")
    with run.claimed(tmp_path / "run"), in_use:
        run.claimed(tmp_path / "run").__enter__()
    with run.claimed(tmp_path / "run"):
        pass


def test_who_waits_for_a_folder_can_be_asked_to_stop(tmp_path):
    def stop() -> None:
        raise Preempted

    with run.claimed(tmp_path / "run"), pytest.raises(Preempted):
        run.claimed(tmp_path / "run", stop).__enter__()


def test_a_folder_that_cannot_be_made_is_named_with_its_flag(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(CheckpointError, match=f"--log-dir: {folder} cannot be written"):
            run.claimed(folder).__enter__()


def test_a_path_to_resume_counts_until_the_folder_has_checkpoints_of_its_own(tmp_path, capsys):
    other = str(save(tmp_path / "checkpoint-7.pth.tar"))
    folder = tmp_path / "run"
    assert found(folder, resume=other) == "checkpoint-7.pth.tar"
    save(folder / "checkpoint-8.pth.tar")
    assert found(folder, resume=other) == "checkpoint-8.pth.tar"
    assert f"--resume {other}: passed over" in capsys.readouterr().out


def test_what_is_whole_but_no_checkpoint_of_a_run_gives_way_to_the_one_before(tmp_path, capsys):
    save(tmp_path / "run/checkpoint-1.pth.tar")
    checkpoint.save(tmp_path / "run/checkpoint-2.pth.tar", {"weights": 1})
    assert found(tmp_path / "run") == "checkpoint-1.pth.tar"
    assert "checkpoint-2.pth.tar cannot be used: not a checkpoint" in capsys.readouterr().out


def test_other_names_for_checkpoints_do_not_begin_the_run_anew(tmp_path):
    save(tmp_path / "checkpoint-1.pth.tar")
    flags = {"checkpoint_format": Config.checkpoint_format}
    (tmp_path / "config.json").write_text(json.dumps({"flags": flags}))
    with pytest.raises(UsageError, match=r"--checkpoint-format x-\{epoch\}: .* are called check"):
        found(tmp_path, checkpoint_format="x-{epoch}")


def plan(config: Config, size: int):
    return make_plan(config, size=size, train_size=1000)


def checkpoint_of(config: Config, size: int) -> Found:
    """What a run on `size` ranks leaves of its batch."""
    flags = {
        name: getattr(config, name) for name in ("effective_batch_size", "batches_per_allreduce")
    }
    batch = {"effective_batch_size": plan(config, size).effective_batch_size}
    return Found("x.pth", {"same_run": batch, "said": {"flags": flags}})


def test_another_number_of_ranks_keeps_the_effective_batch():
    said = Config(batch_size=4, batches_per_allreduce=2)
    kept = engine.same_effective_batch(said, plan(said, 2), checkpoint_of(said, 8))
    assert (kept.effective_batch_size, kept.accumulation) == (64, 8)


@pytest.mark.parametrize(
    ("before", "now", "size", "message"),
    [
        ({}, {}, 3, r"x\.pth .* steps of 64 samples, which 3 ranks .* ranks can: 1, 2, 4, 8, 16$"),
        ({}, {"batches_per_allreduce": 4}, 2, "--batches-per-allreduce 4: .* with 2"),
        ({}, {"effective_batch_size": 32}, 2, "--effective-batch-size 32: .* with None"),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_kept_is_refused_in_the_flags_that_were_given(
    before, now, size, message
):
    base = {"batch_size": 4, "batches_per_allreduce": 2}
    earlier = checkpoint_of(Config(**base | before), 8)
    said = Config(**base | {"batches_per_allreduce": 1} | now) if now else Config(**base)
    with pytest.raises(UsageError, match=message):
        engine.same_effective_batch(said, plan(said, size), earlier)


@pytest.fixture
def full_disk():
    """``full_disk(bytes)`` lets no file grow beyond so many bytes; None: any."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        soft = resource.RLIM_INFINITY if size is None else size
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, ignored)


def test_what_a_full_disk_refuses_is_written_later(tmp_path, full_disk, capsys):
    log = RunLog(tmp_path)
    log.restart([{"split": "val", "step": 1}], step=1)
    full_disk(100)
    for step in (2, 3, 4):
        log.row({"split": "val", "step": step, "loss": 0.25})
        log.scalars("val", {"loss": step / 8}, step)
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl cannot grow") == said.count("tfevents") == 1
    assert all(row["step"] < 4 for row in rows(tmp_path)), "whole lines"
    full_disk(None)
    log.row({"split": "val", "step": 5})
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert scalars(tmp_path)["val/loss"] == [(2, 0.25), (3, 0.375), (4, 0.5)]


def test_a_row_that_is_not_finite_is_still_json(tmp_path):
    log = RunLog(tmp_path)
    log.restart([{"loss": float("nan")}], step=1)
    log.row({"loss": float("inf"), "top1": 0.5})
    assert rows(tmp_path) == [{"loss": None}, {"loss": None, "top1": 0.5}]


def test_bad_images_are_remembered_over_a_stop(tmp_path):
    log, progress = RunLog(tmp_path), Progress()
    for names in (["b", "a"], [], ["c", "a"]):
        loader = types.SimpleNamespace(bad_images=names)
        engine.list_bad_images([loader], progress, World(), log)
    assert progress.bad_images == ["a", "b", "c"]
    assert json.loads((tmp_path / "bad_images.json").read_text()) == ["a", "b", "c"]


class Pair(World):
    """A world whose second rank was started otherwise."""

    def __init__(self, **other) -> None:
        self.other = other

    def gather_objects(self, value, name):
        return [value, value | self.other]


@dataclass(frozen=True)
class Source:
    train_dir: str = field(default="x", metadata={"same_run": False})
    on_bad_image: str = field(default="error", metadata={"same_run": False, "choices": ("error",)})
    train_size, val_size, num_classes, fingerprint = 33, 15, CLASSES, "ab-cd"


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
def test_what_the_ranks_must_have_in_common(name):
    with pytest.raises(UsageError, match=f"rank 1 has {name} = 7, but rank 0 has"):
        engine.agree(Pair(**{name: 7}), Config(), Source())
    engine.agree(Pair(), Config(), Source())


def test_paths_and_cpus_are_a_hosts_own():
    said = of_all_ranks(Config(), Source())
    assert said.keys() & {"train_dir", "log_dir", "workers", "single_threaded"} == set()


@pytest.mark.parametrize(
    ("said", "size", "samples"),
    [({}, 1, 97), ({"sync_bn": True}, 2, 97), ({"batch_size": 1}, 1, 8)],
)
def test_a_batch_over_which_there_are_no_statistics_is_refused_before(said, size, samples):
    config = Config(**{"model": "shufflenet_v2_x0_5", "batch_size": 8} | said)
    ends = make_plan(config, size=size, train_size=samples)
    with pytest.raises(UsageError, match=r"--batch-size .* no BatchNorm statistics at 32 px"):
        engine.refuse_single_samples(config, ends, 32)
    engine.refuse_single_samples(config, ends, 64)


def test_synchronised_statistics_are_over_the_micro_batches_of_all_ranks():
    """105 samples leave one for the last micro-batch, but nine for those of both ranks."""
    config = Config(model="shufflenet_v2_x0_5", batch_size=8, sync_bn=True)
    engine.refuse_single_samples(config, make_plan(config, size=2, train_size=105), 32)


def test_the_code_that_ranks_compare_is_the_images_too(tmp_path, monkeypatch):
    """And a source's package counts, wherever it is."""
    package = tmp_path / "elsewhere"
    package.mkdir()
    (package / "__init__.py").write_text("class Source: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import elsewhere

    before = run.versions(elsewhere.Source())["code"]
    for name in ("more.py", "kernels.c"):
        (package / name).touch()
        assert run.versions(elsewhere.Source())["code"] == before
        (package / name).write_text("changed = True\n")
        after = run.versions(elsewhere.Source())["code"]
        assert after != before
        before = after


def test_skipped_steps_end_the_job_only_if_they_are_not_finite():
    progress = Progress()
    from lars.learner import Notice

    for number in range(20):
        notice = Notice(False, False, False, broken=False, cause="none of its images could be read")
        engine.count_skipped(progress, notice, 2, Silence())
        assert (progress.skipped, progress.skipped_in_a_row) == (number + 1, 0)
    broken = Notice(False, False, False, broken=True, cause="not finite, first in fc.weight")
    engine.count_skipped(progress, broken, 2, Silence())
    with pytest.raises(engine.NonFiniteError, match="2 steps in a row were not finite, first in"):
        engine.count_skipped(progress, broken, 2, Silence())
