"""The plan before a run: learning rate as text, memory, exchange, disk and time."""

from __future__ import annotations

import io
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from lars import models
from lars.comm.world import World
from lars.config import Config, UsageError
from lars.config.plan import make_plan
from lars.dry_run import PlannedWorld
from lars.errors import CheckpointError
from lars.learner.build import make_learner, schedule
from lars.learner.classification import Classification
from lars.learner.memory import activation_bytes, bytes_of, memory_of, optimizer_bytes, tensors_of
from lars.models.sync_batch_norm import synchronised
from lars.names import OPTIMIZERS
from lars.observe import lr_plot, plan_lines
from lars.observe.observer import Training
from lars.run import checkpoint, disk
from lars.run.outcome import duration
from lars.run.progress import Progress


def learner_of(config: Config, model: nn.Module, world: World | None = None):
    plan = make_plan(config, size=1, train_size=6400)
    task, cpu = Classification(), torch.device("cpu")
    return make_learner(config, plan, task, model, world or World(), cpu)


# ------------------------------------------------------------------------------------ learning rate


def curve(**flags):
    config = Config(**{"batch_size": 64, "epochs": 10, "warmup_epochs": 2, "base_lr": 8} | flags)
    plan = make_plan(config, size=1, train_size=6400)
    return schedule(config, plan), plan


def test_a_schedule_that_is_constant_from_the_start_is_called_so():
    config = Config(lr_schedule="none", warmup_epochs=0, base_lr=0.1)
    plan = make_plan(config, size=1, train_size=64)
    assert plan_lines.learning_rate(config, plan) == "0.1, constant"


def test_the_corners_of_the_learning_rate():
    assert lr_plot.corners(*curve(base_op="lars", end_lr=0.5)) == (
        "step 0: 0, step 200: 8 (end of warm-up), step 499: 3.441 (middle), step 999: 0.5 (last)"
    )
    assert lr_plot.corners(*curve(warmup_epochs=0)).startswith("step 0: 8, step 499:")
    one_step = curve(warmup_epochs=0, epochs=1, batch_size=6400)
    assert lr_plot.corners(*one_step) == "step 0: 8 (last)"


def test_the_plot_shows_the_peak_and_the_end():
    lines = lr_plot.plot(*curve(base_op="lars"), width=50, height=6)
    assert len(lines) == 8
    assert lines[0].startswith("8 |")
    assert lines[0].index("█") == pytest.approx(len("8 |") + 10, abs=1), "warm-up takes a fifth"
    widths = [len(line) for line in lines[:6]]
    assert widths == sorted(widths), "the rate falls after the peak"
    assert lines[-1].split() == ["epoch", "0", "10"]
    assert all(len(line) <= 3 + 50 for line in lines)
    # The label is the peak even if it lies between two columns.
    assert lr_plot.plot(*curve(base_op="lars", batch_size=7, warmup_epochs=2.13))[0].startswith(
        "8 |"
    )


def test_bars_are_plain_where_the_output_is_ascii(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    line = lr_plot.sparkline(*curve())
    assert line.isascii()
    assert "#" in line


@pytest.mark.parametrize(
    "flags", [{}, {"lr_schedule": "step"}, {"lr_schedule": "constant"}, {"base_lr": 0}]
)
def test_every_schedule_can_be_drawn(flags):
    lr_at, plan = curve(**flags)
    assert len(lr_plot.sparkline(lr_at, plan)) <= 60
    assert len(lr_plot.plot(lr_at, plan)) == 10


# ------------------------------------------------------------------------------------------- memory


def saved_by(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes that a real forward pass keeps for the backward pass, and that are not the network's own."""
    own = {t.untyped_storage().data_ptr() for t in tensors_of(model)}
    saved = {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = model(images)
    del output
    return sum(storage.nbytes() for place, storage in saved.items() if place not in own)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v2", "alexnet"])
def test_the_estimated_activations_are_those_of_a_real_forward_pass(name):
    model = models.build(name, 10).to(memory_format=torch.channels_last)
    before, generator = bytes_of(tensors_of(model)), torch.get_rng_state()
    statistics = [buffer.clone() for buffer in model.buffers()]
    estimate = activation_bytes(model, (3, 3, 64, 64))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(map(torch.equal, statistics, model.buffers()))
    assert bytes_of(tensors_of(model)) == before
    images = torch.zeros(3, 3, 64, 64).to(memory_format=torch.channels_last)
    assert estimate == pytest.approx(saved_by(model, images), rel=0.001)


def test_mixed_precision_needs_about_half_of_the_activations():
    model = models.build("resnet18", 10)
    full = activation_bytes(model, (8, 3, 96, 96))
    half = activation_bytes(model, (8, 3, 96, 96), torch.bfloat16)
    copies_of_weights = bytes_of(model.parameters()) / 2
    assert 0.5 < (half - copies_of_weights) / full < 0.6


def test_the_estimate_never_communicates_and_never_compiles():
    """It runs on the root only, so a collective would hang the job."""

    def forbidden(*args):
        raise AssertionError(args)

    model = synchronised(models.build("resnet18", 10), forbidden)
    model._compiled_call_impl = forbidden  # what Module.compile sets
    assert activation_bytes(model, (2, 3, 32, 32)) > 0
    assert model._compiled_call_impl is forbidden
    assert model.bn1.all_reduce is forbidden


def test_a_network_that_needs_values_has_no_estimate():
    class Picky(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    assert activation_bytes(Picky(), (2, 3, 8, 8)) is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_size_of_the_optimizer_state_is_known_before_the_first_step(name):
    learner = learner_of(
        Config(base_op=name, base_lr=0.01), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    )
    weights = [parameter.detach().clone() for parameter in learner.model.parameters()]
    estimate = optimizer_bytes(learner.optimizer)
    assert all(map(torch.equal, weights, learner.model.parameters()))
    for parameter in learner.model.parameters():
        assert parameter.grad is None
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    assert estimate == optimizer_bytes(learner.optimizer) > 0


def test_an_optimizer_that_needs_values_has_no_estimate():
    class Picky(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0]["params"][0].sum() > 0:
                super().step()

    class Single(torch.optim.SGD):
        def __deepcopy__(self, memo):
            raise RuntimeError("there is only one")

    for kind in (Picky, Single):
        assert optimizer_bytes(kind([nn.Parameter(torch.ones(3))], lr=1.0)) is None


def test_the_memory_line_names_its_parts():
    config = Config(base_op="adam", batch_size=4, ema_decay=0.9)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    learner = learner_of(config, model)
    plan = make_plan(config, size=1, train_size=6400)
    line = plan_lines.memory(learner, plan, types.SimpleNamespace(image_size=16))
    needed = memory_of(learner, (4, 3, 16, 16))
    assert needed.average == needed.weights == needed.gradients
    assert needed.total > needed.activations > 4 * 3 * 16 * 16 * 4
    parts = ("weights", "gradients", "optimizer", "moving average", "activations")
    assert all(f"{part} " in line for part in parts)
    assert "unknown" not in line


# ----------------------------------------------------------------------------- exchange, disk, time


def test_the_bytes_that_a_rank_exchanges():
    learner = learner_of(Config(), nn.Linear(1023, 1024))  # 4 MiB
    config = Config(batch_size=64)
    for size, half, words in (
        (1, False, "none with a single rank"),
        (4, False, "4 MiB of gradients per step; each rank sends and receives 6 MiB"),
        (4, True, "2 MiB of gradients per step; each rank sends and receives 3 MiB"),
    ):
        plan = make_plan(config, size=size, train_size=6400)
        assert words in plan_lines.exchange(learner, plan, half=half)


def space_of(folder: Path, **flags) -> disk.DiskSpace:
    config = Config(base_op="lars", **flags)
    learner = learner_of(config, nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512)))
    return disk.disk_space(folder, config, make_plan(config, size=1, train_size=6400), learner)


def test_the_size_of_a_checkpoint_is_that_of_a_written_one(tmp_path):
    config = Config(base_op="lars", base_lr=0.1, ema_decay=0.9)
    learner = learner_of(config, nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512)))
    plan = make_plan(config, size=1, train_size=6400)
    space = disk.disk_space(tmp_path / "new" / "run", config, plan, learner)
    for parameter in learner.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    checkpoint.save(tmp_path / "checkpoint-1.pth.tar", learner.state_dict())
    assert space.checkpoint == pytest.approx(
        (tmp_path / "checkpoint-1.pth.tar").stat().st_size, rel=0.02
    )
    assert space.count == config.keep_checkpoints + 2
    assert not (tmp_path / "new").exists()


def free_space(monkeypatch, size: float) -> None:
    usage = types.SimpleNamespace(free=size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_a_disk_that_is_too_small_causes_a_warning_or_an_error(tmp_path, monkeypatch):
    needed, one = (space := space_of(tmp_path)).needed, space.checkpoint
    for free, warnings in ((needed, 0), (needed - 1, 1), (one, 1)):
        free_space(monkeypatch, free)
        found = list(disk.space_warnings(tmp_path, space_of(tmp_path)))
        assert len(found) == warnings
    assert all(word in found[0] for word in ("--log-dir", "5 checkpoints", "--keep-checkpoints"))
    free_space(monkeypatch, one - 1)
    with pytest.raises(CheckpointError, match=r"--log-dir: .* a checkpoint takes 2\.\d+ MiB"):
        list(disk.space_warnings(tmp_path, space_of(tmp_path)))


def test_files_that_exist_already_need_no_more_space(tmp_path, monkeypatch):
    free_space(monkeypatch, 0)
    missing = space_of(tmp_path).missing
    (tmp_path / "checkpoint-1.pth.tar").write_bytes(bytes(1000))
    (tmp_path / "best.safetensors").write_bytes(bytes(500))
    (tmp_path / "unrelated").write_bytes(bytes(500))
    assert space_of(tmp_path).missing == missing - 1500


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run"
    with pytest.raises(CheckpointError, match=f"--log-dir: {folder} cannot be written"):
        disk.refuse_unwritable(folder)
    disk.refuse_unwritable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"), (102_400_000, "97.7 MiB"), (1 << 40, "1 TiB"),
     (500 << 30, "500 GiB"), (5000 << 40, "5000 TiB")],
)  # fmt: skip
def test_sizes_are_readable(size, text):
    assert disk.in_units(size) == text


def time_line(step: int, **flags) -> str:
    config = Config(batch_size=64, epochs=5, val_every=2, **flags)
    run = types.SimpleNamespace(plan=make_plan(config, size=1, train_size=6420))
    source = types.SimpleNamespace(val_size=1000)
    training = Training(config, source, run, None, Progress(step=step))
    return plan_lines.time_needed(training, 10.0)


def test_the_time_that_a_run_needs():
    """6420 images in 101 steps, of which the last has 20. The validations are after epochs 2, 4 and 5."""
    assert (
        time_line(0)
        == "10 min 42 s for an epoch, 58 min 30 s for the run with 5 min 0 s of validation, at 10 images/s"
    )
    assert "with 10 min 0 s of validation" in time_line(0, ema_decay=0.9), "of two networks"
    # Half of the fourth epoch, the fifth, and the validations after both.
    left = (6420 - 50 * 64 + 6420 + 2000) / 10
    assert f"{duration(left)} for the rest of the run" in time_line(3 * 101 + 50)
    assert "6 min 24 s for the run with 0 s of validation" in time_line(0, max_steps=60)


# ---------------------------------------------------------------------------------------- dry run


def test_a_planned_world_has_ranks_that_do_not_answer():
    world = PlannedWorld(512)
    assert (world.size, world.rank, world.is_root) == (512, 0, True)
    learner = learner_of(Config(), nn.Linear(4, 4), world)
    assert learner.gradients.world is world


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"plan_ranks": 4}, "--plan-ranks 4 belongs to --dry-run"),
        ({"plan_ranks": 0, "dry_run": True}, "--plan-ranks must be at least 1"),
        ({"images_per_second": 0}, "--images-per-second must be more than 0"),
        (
            {"dry_run": True, "benchmark": "noise"},
            "--dry-run and --benchmark cannot be used together",
        ),
        ({"dry_run": True, "evaluate": "x"}, "--dry-run and --evaluate cannot be used together"),
    ],
)
def test_flags_of_the_plan_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        Config(**flags)
