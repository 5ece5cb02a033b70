"""Every recipe can be parsed and planned, and states its source and result."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from data.sources.imagenet import ImageNet, ImageNetDali
from lars.comm.world import World
from lars.config import Config, parse, recipes
from lars.config.plan import make_plan
from lars.expected import curves
from lars.learner import classification
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


# What the sources of the long recipes state: epochs, samples per step, peak of the learning rate, epochs of warm-up;
# label smoothing, mixup, CutMix; sides of the first and the last training images and of the validation images, and the
# shorter side of these before cropping.
LONG = {
    "imagenet_rsb_a1_2048": (600, 2048, 5e-3, 5, 0.1, 0.2, 1, 224, 224, 224, 235),
    "imagenet_rsb_a2_2048": (300, 2048, 5e-3, 5, 0, 0.1, 1, 224, 224, 224, 235),
    "imagenet_rsb_a3_2048": (100, 2048, 8e-3, 5, 0, 0.1, 1, 160, 160, 224, 235),
    "imagenet_torchvision_v2_1024": (600, 1024, 0.5, 5, 0.1, 0.2, 1, 176, 176, 224, 232),
    "imagenet_mosaic_mild_2048": (29, 2048, 2.048, 8, 0.08, 0, 0, 88, 176, 224, 232),
} | {
    f"imagenet_ffcv_4096_{epochs}_epochs": (epochs, 4096, 1.7, 2, 0.1, 0, 0, 160, 192, 256, 293)
    for epochs in (16, 24, 32, 40, 56, 88)
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_recipe_is_as_published_and_its_images_can_be_read(name, folders):
    words = ["--recipe", name, "--train-dir", f"{folders}/train", "--val-dir", f"{folders}/val"]
    config, source = parse(words, Config, ImageNet, description="")
    plan = make_plan(config, size=1, train_size=IMAGENET)
    source.check()
    sizes = dict(source.train_sizes)
    assert (
        *(config.epochs, plan.effective_batch_size, plan.peak_lr, config.warmup_epochs),
        *(config.label_smoothing, config.mixup, config.cutmix),
        *(sizes[min(sizes)], sizes[max(sizes)], source.image_size, source.val_resize),
    ) == LONG[name]
    assert max(sizes) <= config.epochs
    setup = classification.setup(config, source, World(), torch.nn.Flatten())
    assert (setup.augment is not None) == (config.mixup > 0)


@pytest.mark.parametrize(
    ("name", "ramp"),
    [("16", (11, 13)), ("24", (17, 20)), ("32", (23, 27)), ("40", (29, 34)), ("56", (41, 48)), ("88", (65, 76))],
)  # fmt: skip
def test_the_ffcv_recipes_have_the_published_rates_and_sizes(name, ramp):
    config, images = read(f"imagenet_ffcv_4096_{name}_epochs")
    plan = make_plan(config, size=8, train_size=IMAGENET)
    assert plan.steps_per_epoch == IMAGENET // 8 // 512
    epochs = np.arange(0, plan.total_steps) / plan.steps_per_epoch
    published = np.interp(epochs, [0, 2, config.epochs], [1.7e-4, 1.7, 0])
    rates = [schedule(config, plan)(step) for step in range(plan.total_steps)]
    assert np.allclose(rates, published, rtol=0, atol=1.8e-4)
    # A size is rounded to a multiple of 32 while it grows from 160 to 192 within the ramp.
    grown = np.round(np.interp(np.arange(config.epochs), ramp, (160, 192)) / 32) * 32
    assert [size_in(images, epoch) for epoch in range(1, config.epochs + 1)] == grown.tolist()


def size_in(images: ImageNet, epoch: int) -> int:
    """The side of the training images in an epoch, from 1."""
    return max((first, size) for first, size in images.train_sizes if first <= epoch)[1]


def test_the_mosaic_recipe_converts_decay_average_and_sizes():
    config, images = read("imagenet_mosaic_mild_2048")
    assert config.wd == pytest.approx(5e-4 * (1 - config.momentum) / config.base_lr, rel=1e-12)
    assert config.ema_decay == pytest.approx(0.5 ** (1 / 100), abs=1e-7)
    assert (config.loss, config.bce_sum, config.bn_bias_separately) == ("bce", True, False)
    grown = np.interp((np.arange(29) + 0.5) / 29, (0.4, 0.8), (88, 176))
    sizes = [size_in(images, epoch) for epoch in range(1, 30)]
    assert sizes == (4 * np.round(grown / 4)).tolist()


def test_the_torchvision_recipe_converts_the_average():
    config, images = read("imagenet_torchvision_v2_1024")
    assert config.ema_decay == pytest.approx((1 - 2e-5 * 1024 * 32 / 600) ** (1 / 32), abs=1e-7)
    assert (images.auto_augment, images.random_erasing, images.repeated_aug) == ("ta", 0.1, 4)
    assert (config.loss, config.wd, config.momentum, config.nesterov) == ("ce", 2e-5, 0.9, False)


@pytest.mark.parametrize(
    ("procedure", "decay", "threshold", "magnitude", "repeats"),
    [("a1", 0.01, None, 7, 3), ("a2", 0.02, 0.2, 7, 3), ("a3", 0.02, 0.2, 6, 1)],
)
def test_the_recipes_of_resnet_strikes_back(procedure, decay, threshold, magnitude, repeats):
    config, images = read(f"imagenet_rsb_{procedure}_2048")
    assert (config.base_op, config.lamb_form, config.end_lr) == ("lamb", "apex", 1e-6)
    assert (config.wd, config.bce_target_threshold) == (decay, threshold)
    assert (config.loss, config.bce_sum, config.lr_schedule) == ("bce", False, "cosine")
    # timm's magnitudes end at 10, and torchvision's at 30.
    assert (images.auto_augment, images.ra_magnitude / 3) == ("ra", magnitude)
    assert images.repeated_aug == repeats
