"""Warnings at the start of a run, the summary, and the flags of each optimizer."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from torch import nn

from lars.comm.world import World
from lars.config import Config, UsageError, parse
from lars.config.barlow_twins import BarlowTwinsConfig
from lars.config.plan import make_plan
from lars.learner.build import make_learner, make_optimizer, schedule
from lars.learner.classification import Classification
from lars.observe.advice import warnings
from lars.observe.observer import Training
from lars.observe.summary import counted, loss, moving_average
from lars.run.identity import run_folder, run_name
from lars.run.progress import Progress


def warned(
    tmp_path: Path, samples: int = 640, copies: int = 1, init: dict | None = None, **flags
) -> list[str]:
    config = Config(log_dir=str(tmp_path), **flags)
    plan = make_plan(config, size=1, train_size=samples)
    run = types.SimpleNamespace(plan=plan, folder=run_folder(config))
    source = types.SimpleNamespace(warnings=[], num_classes=10, image_size=32, repeated_aug=copies)
    network, cpu = nn.Linear(2, 2), torch.device("cpu")
    learner = make_learner(config, plan, Classification(), network, World(), cpu)
    return warnings(Training(config, source, run, learner, Progress(init=init or {})))


@pytest.mark.parametrize(
    ("flags", "samples", "words"),
    [
        ({"epochs": 3}, 640, ["--warmup-epochs 5", "--epochs 3", "never decays"]),
        ({"effective_batch_size": 1024}, 640, ["effective batch size 1024", "640 images"]),
        ({"lr_schedule": "step", "end_lr": 0.1}, 640, ["--end-lr has no effect", "step"]),
        ({"loss": "bce"}, 640, ["--loss bce is the mean over 10 classes", "add --bce-sum"]),
        (
            {"loss": "bce", "bce_target_threshold": 0.2, "base_op": "lamb"},
            640,
            ["--label-smoothing 0.1 has little effect", "--label-smoothing 0"],
        ),
        ({"base_op": "tvlars"}, 640, ["--warmup-epochs 5", "tvlars", "--warmup-epochs 0"]),
        (
            {"ema_decay": 0.9999, "ema_warmup": False, "epochs": 50},
            640,
            ["--ema-decay 0.9999", "10000 steps", "1000"],
        ),
    ],
)
def test_a_doubtful_setting_causes_a_warning_with_its_flag(tmp_path, flags, samples, words):
    (warning,) = warned(tmp_path, samples, **flags)
    assert all(word in warning for word in words), warning


def test_more_copies_than_samples_in_a_step_cause_a_warning(tmp_path):
    (warning,) = warned(tmp_path, copies=33)
    assert "--repeated-aug 33 is more than the effective batch size 32" in warning


@pytest.mark.parametrize("flag", [{"zero_init_last_gamma": True}, {"weight_init": "xavier_normal"}])
def test_initial_weights_that_a_file_replaces_cause_a_warning(tmp_path, flag):
    record = {"from": "x.pth", "missing": [], "unexpected": [], "new_heads": []}
    (warning,) = warned(tmp_path, init=record, **flag)
    (name,) = flag
    assert f"--{name.replace('_', '-')} has no effect with --init x.pth" in warning
    assert len(warned(tmp_path, init=record | {"new_heads": ["fc"]}, **flag)) == (name[0] == "z")
    (warning,) = warned(tmp_path, init=record | {"missing": ["bn2.weight"]}, **flag)
    assert "1 missing (bn2.weight)" in warning


def test_the_summary_names_the_loss_and_the_average():
    def rows(**flags) -> list[tuple[str, str]]:
        config = Config(**flags)
        return [*loss(config), *moving_average(config)]

    assert rows() == [("loss", "cross-entropy, label smoothing 0.1")]
    assert rows(
        loss="bce", bce_sum=True, label_smoothing=0, mixup=0.2, cutmix=1, ema_decay=0.9
    ) == [
        (
            "loss",
            "binary cross-entropy, sum over classes, mixup 0.2 or cutmix 1 in each micro-batch",
        ),
        ("moving average", "decay 0.9 per step, lower in the first steps"),
    ]
    assert list(loss(BarlowTwinsConfig())) == []


def test_a_sensible_run_has_no_warning(tmp_path):
    assert warned(tmp_path) == []
    assert warned(tmp_path, ema_decay=0.9999) == [], "with its warm-up the average keeps up"
    assert warned(tmp_path, effective_batch_size=640, batch_size=64) == []


def test_a_longer_run_gets_a_hint_at_the_shorter_one(tmp_path):
    shorter = Config(epochs=60)
    folder = tmp_path / run_name(shorter)
    folder.mkdir()
    assert warned(tmp_path, epochs=90) == []
    (folder / "checkpoint-60.pth.tar").touch()
    (warning,) = warned(tmp_path, epochs=90)
    assert f"{folder} holds a run of 60 epochs" in warning
    assert "--branch" in warning
    assert warned(tmp_path, epochs=90, run_name="mine") == []


def test_a_run_whose_only_step_has_learning_rate_zero_is_refused():
    with pytest.raises(UsageError, match=r"--warmup-epochs 5: the only step .* --warmup-epochs 0"):
        make_plan(Config(epochs=1, effective_batch_size=1024), size=1, train_size=640)
    make_plan(Config(epochs=1, effective_batch_size=1024, warmup_epochs=0), size=1, train_size=640)


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [(1, "rank", "1 rank"), (2, "rank", "2 ranks"), (4, "micro-batch", "4 micro-batches")],
)
def test_counted_uses_the_plural(number, noun, words):
    assert counted(number, noun) == words


def read(*argv: str) -> Config:
    return parse(argv, Config, description="")[0]


def test_tvlars_has_its_own_schedule_and_options():
    config = read("--base-op", "tvlars", "--lmbda", "0.01", "--base-lr", "2")
    assert (config.warmup_epochs, config.lr_schedule) == (0.0, "constant")
    rate = schedule(config, make_plan(config, size=1, train_size=640))
    assert [rate(step) for step in (0, 1, 1799)] == [2.0, 2.0, 2.0]
    group = make_optimizer(config, nn.Linear(2, 2), 2.0).param_groups[0]
    assert (group["lmbda"], group["alpha"], group["trust_coefficient"]) == (0.01, 0.1, 1e-3)
    config = read("--base-op", "tvlars", "--warmup-epochs", "5", "--trust-coefficient", "0.02")
    assert config.warmup_epochs == 5.0
    group = make_optimizer(config, nn.Linear(2, 2), 2.0).param_groups[0]
    assert group["trust_coefficient"] == 0.02


def test_a_flag_that_the_optimizer_does_not_use_is_refused(capsys):
    for flags in (["--lars-form", "optax"], ["--base-op", "adamw", "--momentum", "0.8"]):
        with pytest.raises(SystemExit, match="2"):
            read(*flags)
        message = capsys.readouterr().err
        assert "has no effect with --base-op" in message
        assert "it belongs to" in message


def test_a_recipe_may_have_flags_of_an_optimizer_that_the_command_line_replaces(tmp_path):
    recipe = tmp_path / "lars.args"
    recipe.write_text("--base-op lars --epsilon 1e-5 --warmup-epochs 2\n")
    assert read(f"@{recipe}", "--base-op", "sgd").base_op == "sgd"
    assert read(f"@{recipe}", "--base-op", "tvlars").warmup_epochs == 2.0


def test_classification_refuses_two_views():
    from lars.comm.world import World
    from lars.learner import build

    source = types.SimpleNamespace(views=2, image_size=64, num_classes=3)
    config = Config(model="resnet18", no_cuda=True)
    with pytest.raises(UsageError, match="--views 2: classification takes one view"):
        build.learner(config, make_plan(config, size=1, train_size=640), source, World())
