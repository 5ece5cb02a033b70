"""Every recipe can be parsed and planned, and states its source and result."""

from __future__ import annotations

import re

import pytest
import torch

from conftest import ROOT
from data.sources.imagenet import ImageNet, ImageNetDali
from lars.config import Config, parse
from lars.config.plan import make_plan

RECIPES = sorted(path.name for path in (ROOT / "launch" / "recipes").glob("*.args"))
IMAGENET = 1_281_167


def read(name: str, source=ImageNet):
    return parse([f"@launch/recipes/{name}"], Config, source, description="")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes include others by their path from there


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_a_plan_and_names_its_result(name):
    config, _ = read(name)
    read(name, ImageNetDali)
    plan = make_plan(config, size=1, train_size=1437 if "digits" in name else IMAGENET)
    assert plan.effective_batch_size == int(re.findall(r"_(\d+)", name)[0])
    assert config.ignored_by_the_schedule() == []
    header = (ROOT / "launch" / "recipes" / name).read_text()
    assert re.search(r"^# .*(\d %|0\.\d+ top-1|accuracy)", header, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "peak", "warmup_epochs", "micro_batches"),
    [
        ("alexnet_sgd_512.args", 0.01, 0, 8),
        ("alexnet_sgd_4096.args", 0.08, 5, 64),
        ("alexnet_lars_4096.args", 10, 13, 16),
        ("alexnet_lars_8192.args", 10, 8, 32),
        ("alexnet_bn_sgd_4096.args", 0.3, 5, 16),
        ("alexnet_bn_sgd_8192.args", 0.41, 5, 32),
    ],
)
def test_the_recipes_of_the_lars_paper(name, peak, warmup_epochs, micro_batches):
    config, _ = read(name)
    plan = make_plan(config, size=1, train_size=IMAGENET)
    assert (plan.peak_lr, plan.accumulation) == (peak, micro_batches)
    assert plan.warmup_steps == warmup_epochs * plan.steps_per_epoch
    assert (plan.total_steps, config.lr_power) == (100 * plan.steps_per_epoch, 2)


@pytest.mark.parametrize("source", [ImageNet, ImageNetDali])
def test_the_recipe_without_augmentation_takes_the_same_box_in_every_epoch(source):
    _, images = read("resnet50_lars_32768_without_augmentation.args", source)
    transform = images.train_transform()
    for height, width, square in (
        (375, 500, (0, 62, 375, 375)),
        (500, 333, (83, 0, 333, 333)),
        (64, 64, (0, 0, 64, 64)),
    ):
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            assert tuple(transform.box(height, width, generator)) == square
            assert not transform.mirrored(generator)
