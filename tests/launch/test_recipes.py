"""Every recipe can be parsed and planned, and states its source and result."""

from __future__ import annotations

import re

import pytest
import torch

from data.sources.imagenet import ImageNet, ImageNetDali
from lars.config import Config, parse, recipes
from lars.config.plan import make_plan
from lars.expected import curves
from lars.learner.build import schedule

FILES = recipes.names()
IMAGENET = 1_281_167
# Results that the source gives in words.
WITHOUT_NUMBER = ("below that of a batch size of 512", "not stated as a number")


def read(name: str, source=ImageNet):
    return parse(["--recipe", name], Config, source, description="")


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_fits_the_numbers_of_gpus_that_it_names(name):
    text, (config, _) = FILES[name].read_text(), read(name)
    read(name, ImageNetDali)
    assert config.ignored_by_the_schedule() == []
    divides = re.search(r"number of\s+(?:# )?GPUs must\s+(?:# )?divide (\d+)", text)
    most = int(divides[1]) if divides else 1
    for size in (1, most):
        plan = make_plan(config, size=size, train_size=IMAGENET)
    assert plan.accumulation == 1 or not divides
    assert plan.effective_batch_size == int(re.findall(r"_(\d+)", name)[0])
    rates = [schedule(config, plan)(step) for step in range(0, plan.total_steps, 97)]
    assert 0.9 * plan.peak_lr < max(rates) <= plan.peak_lr


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_states_its_result_and_its_source(name):
    text = FILES[name].read_text()
    result = re.search(r"^# Result: (.+)$", text, re.MULTILINE)
    assert "%" in result[1] or result[1] in WITHOUT_NUMBER
    assert re.search(r"^# Source: \S", text, re.MULTILINE)
    assert name.startswith("digits") or "# Not reproduced here" in text


@pytest.mark.parametrize("name", [name for name in FILES if re.match(r"imagenet_mlperf_\d", name)])
def test_an_mlperf_recipe_is_as_submitted(name):
    config, _ = read(name)
    assert (config.lars_form, config.epsilon, config.trust_coefficient) == ("mlperf", 0, 0.001)
    assert (config.lr_power, config.end_lr, config.label_smoothing) == (2, 1e-4, 0.1)
    result = re.search(r"after ([\d.]+) epochs", FILES[name].read_text())
    assert 0.94 < float(result[1]) / config.epochs < 0.98
    # Its schedule is as long as those of the published runs with which it is compared.
    curve = curves()[config.expected_curve]
    assert curve.last_epoch(config.epochs) == curve.epochs[-1]


def test_the_lamb_recipe_takes_the_published_steps():
    plan = make_plan(read("imagenet_lamb_32768")[0], size=1, train_size=IMAGENET)
    assert plan.total_steps == pytest.approx(3519, rel=0.003)
    assert plan.warmup_steps == pytest.approx(782, rel=0.003)


@pytest.mark.parametrize("name", ["imagenet_nesterov_512", "imagenet_nesterov_2048"])
def test_the_nesterov_recipes_take_the_published_steps(name):
    plan = make_plan(read(name)[0], size=1, train_size=IMAGENET)
    published = re.search(r"\((\d+) steps\)", FILES[name].read_text())
    assert plan.total_steps == int(published[1])


@pytest.mark.parametrize(
    ("name", "peak", "warmup_epochs", "micro_batches"),
    [
        ("alexnet_sgd_512", 0.01, 0, 8),
        ("alexnet_sgd_4096", 0.08, 5, 64),
        ("alexnet_lars_4096", 10, 13, 16),
        ("alexnet_lars_8192", 10, 8, 32),
        ("alexnet_bn_sgd_4096", 0.3, 5, 16),
        ("alexnet_bn_sgd_8192", 0.41, 5, 32),
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
    _, images = read("resnet50_lars_32768_without_augmentation", source)
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
