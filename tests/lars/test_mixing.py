"""Mixup, CutMix and the losses of mixed images, compared with torchvision and with torch."""

from __future__ import annotations

import math
from functools import partial
from random import Random

import pytest
import torch
from run_folders import rows
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torchvision.transforms import v2

from data.sources.noise import Synthetic
from lars.comm.gradients import LocalGradients
from lars.comm.world import World
from lars.config import Config, UsageError
from lars.engine import train
from lars.learner import classification
from lars.learner.build import augmented
from lars.learner.classification import Classification
from lars.learner.learner import Learner
from lars.learner.losses import binary_cross_entropy, cross_entropy, one_hot
from lars.learner.mixing import Box, Mix, Mixing, draw_mix, mixed_images, mixed_targets

CLASSES = 5


def batch(samples: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(samples)
    images = torch.randn(samples, 3, 8, 12, generator=generator, dtype=dtype)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    return images.to(memory_format=torch.channels_last), labels


@pytest.mark.parametrize("samples", [1, 2, 7])
@pytest.mark.parametrize(
    "mix",
    [Mix(0.0), Mix(0.3), Mix(1.0), Mix(1 - 15 / 96, Box(2, 7, 5, 12)), Mix(1.0, Box(3, 4, 3, 9))],
)
def test_mixing_equals_torchvision(samples, mix):
    images, labels = batch(samples)
    before = images.clone()
    params = {"labels": labels, "batch_size": samples}
    if mix.box is None:
        theirs, params = v2.MixUp(num_classes=CLASSES), params | {"lam": mix.share}
    else:
        top, left, bottom, right = mix.box
        theirs = v2.CutMix(num_classes=CLASSES)
        params |= {"box": (left, top, right, bottom), "lam_adjusted": mix.share}
    mixed = mixed_images(images, mix)
    assert torch.equal(mixed, theirs.transform(images, params))
    assert torch.equal(
        mixed_targets(labels, mix, CLASSES, torch.float32), theirs.transform(labels, params)
    )
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before), "a loader may use its batch again"


def test_shares_and_boxes_have_the_published_distributions():
    def draws(**flags) -> list[Mix]:
        return [draw_mix(Random(f"7 {step} 0"), 20, 30, **flags) for step in range(2000)]

    shares = torch.tensor([mix.share for mix in draws(mixup=0.2)])
    # The variance of Beta(a, a) is 1 / (4 (2 a + 1)).
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / 5.6, rel=0.05)
    for mix in draws(cutmix=1.0):
        top, left, bottom, right = mix.box
        assert 0 <= top <= bottom <= 20
        assert 0 <= left <= right <= 30
        assert mix.share == pytest.approx(1 - (bottom - top) * (right - left) / 600)
    both = draws(mixup=0.2, cutmix=1.0)
    assert sum(mix.box is None for mix in both) == pytest.approx(1000, abs=100)
    assert draws(mixup=0.2, cutmix=1.0) == both
    for extreme in (1e-9, 999):
        assert all(0 <= mix.share <= 1 for mix in draws(mixup=extreme, cutmix=extreme))


def test_the_place_in_the_step_and_not_the_rank_decides_how_a_micro_batch_is_mixed():
    mixing, shares = Mixing(CLASSES, mixup=1.0), {}
    for size in (1, 2, 4):
        for rank in range(size):
            for micro_batch in range(4 // size):
                _, targets = augmented(mixing, 3, batch(2), 5, micro_batch, rank=rank, size=size)
                shares.setdefault(micro_batch * size + rank, set()).add(targets[0].max().item())
    assert [len(each) for each in shares.values()] == [1] * 4
    assert len(set.union(*shares.values())) == 4
    other = [
        augmented(mixing, seed, batch(2), step, 0, rank=0, size=1)[1][0].max().item()
        for seed, step in ((3, 5), (3, 6), (4, 5))
    ]
    assert len(set(other)) == 3


def test_the_device_is_never_waited_for():
    """Tensors on the meta device have no values, so an operation that needs one fails."""
    images, labels = (part.to("meta") for part in batch(4))
    logits = torch.zeros(4, CLASSES, device="meta")
    for flags in ({"mixup": 1.0}, {"cutmix": 1.0}):
        mixed, targets = Mixing(CLASSES, **flags)((images, labels), Random(1))
        assert (mixed.shape, targets.shape) == ((4, 3, 8, 12), (4, CLASSES))
        for loss in (cross_entropy, partial(binary_cross_entropy, target_threshold=0.2)):
            assert loss(logits, targets).shape == loss(logits, labels).shape == ()


@pytest.mark.parametrize("samples", [0, 1])
@pytest.mark.parametrize("loss", [cross_entropy, binary_cross_entropy])
def test_micro_batches_of_no_image_and_of_one(samples, loss):
    images, labels = batch(samples)
    mixed, targets = Mixing(CLASSES, mixup=0.3, cutmix=1.0)((images, labels), Random(2))
    assert torch.allclose(mixed, images)
    task = Classification(loss=loss, label_smoothing=0.1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(288, CLASSES))
    total, sums = task.loss_and_sums(network, (mixed, targets))
    plain, others = task.loss_and_sums(network, (images, labels))
    assert total.item() == pytest.approx(plain.item(), rel=1e-6)
    assert sums["top1"] == others["top1"]
    total.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_equal_those_of_torch(smoothing):
    _, labels = batch(6)
    logits = torch.randn(6, CLASSES, dtype=torch.float64)
    hard = one_hot(labels, CLASSES, torch.float64)
    assert torch.equal(hard, functional.one_hot(labels, CLASSES).double())
    soft = mixed_targets(labels, Mix(0.7), CLASSES, torch.float64)
    for targets in (labels, hard, soft):
        expected = functional.cross_entropy(logits, targets, label_smoothing=smoothing)
        ours = cross_entropy(logits, targets, label_smoothing=smoothing)
        assert ours.item() == pytest.approx(6 * expected.item(), rel=1e-12)
        smooth = (hard if targets.ndim == 1 else targets) * (1 - smoothing) + smoothing / CLASSES
        for threshold in (None, 0.2):
            wanted = smooth if threshold is None else (smooth > threshold).double()
            expected = functional.binary_cross_entropy_with_logits(logits, wanted)
            ours = partial(
                binary_cross_entropy, logits, targets,
                label_smoothing=smoothing, target_threshold=threshold,
            )  # fmt: skip
            assert ours().item() == pytest.approx(6 * expected.item(), rel=1e-12)
            assert ours(sum_classes=True).item() == pytest.approx(
                6 * CLASSES * expected.item(), rel=1e-12
            )


def test_losses_of_half_precision_are_computed_in_single_precision():
    _, labels = batch(6)
    targets = mixed_targets(labels, Mix(0.7), CLASSES, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for loss in (cross_entropy, binary_cross_entropy):
            logits = 50 * torch.randn(6, CLASSES).bfloat16()
            assert loss(logits, targets).dtype == torch.float32
            assert torch.allclose(loss(logits, targets), loss(logits.float(), targets))


@pytest.mark.parametrize("summed", [False, True])
def test_accumulation_with_bce_equals_the_large_batch(summed):
    images, labels = batch(12, torch.float64)

    def weights(*sizes: int) -> torch.Tensor:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(288, CLASSES)).double()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        loss = partial(binary_cross_entropy, sum_classes=summed)
        learner = Learner(
            network, optimizer, LocalGradients(network.parameters()),
            Classification(loss=loss, label_smoothing=0.1), lr_at=lambda step: 0.5,
        )  # fmt: skip
        for step in range(3):
            parts = list(zip(images.split(sizes), labels.split(sizes), strict=True))
            assert learner.step(parts, step, count=len(parts), samples=12).taken
        return network[1].weight.detach()

    assert torch.allclose(weights(12), weights(5, 4, 2, 1), rtol=0, atol=1e-12)


def test_accuracy_of_a_mixed_image_counts_its_dominant_label():
    logits = torch.eye(CLASSES)[[0, 1, 2]]
    targets = mixed_targets(torch.tensor([0, 1, 2]), Mix(0.6), CLASSES, torch.float32)
    task = Classification()
    assert task.loss_and_sums(lambda x: x, (logits, targets))[1]["top1"] == 3
    targets = mixed_targets(torch.tensor([0, 1, 2]), Mix(0.4), CLASSES, torch.float32)
    assert task.loss_and_sums(lambda x: x, (logits, targets))[1]["top1"] == 0


def test_flags_choose_the_loss_and_the_mixing():
    source = Synthetic(image_size=28, num_classes=10)

    def setup(**flags) -> classification.Setup:
        return classification.setup(Config(**flags), source, World(), nn.Flatten())

    assert setup().augment is None
    assert setup().task.loss is cross_entropy
    mixing = setup(mixup=0.2, cutmix=1.0).augment
    assert (mixing.num_classes, mixing.mixup, mixing.cutmix) == (10, 0.2, 1.0)
    flags = {"loss": "bce", "label_smoothing": 0.1}
    keywords = setup(**flags, bce_target_threshold=0.2, bce_sum=True).task.loss.keywords
    assert keywords == {"target_threshold": 0.2, "sum_classes": True}
    with pytest.raises(UsageError, match=r"0\.009 is below .* 0\.1 / 10 classes"):
        setup(**flags, bce_target_threshold=0.009)


def trained(folder, name: str, **flags) -> dict[str, torch.Tensor]:
    """Train for two epochs of four steps in this process, and return the weights."""
    source = Synthetic(image_size=28, num_classes=3, train_size=60, val_size=16)
    config = Config(
        **{"model": "small_cnn", "base_lr": 0.05, "lr_schedule": "none", "epochs": 2} | flags,
        batch_size=8, effective_batch_size=16, log_dir=str(folder), run_name=name, no_cuda=True, workers=0,
    )  # fmt: skip
    train(config, source)
    return load_file(folder / name / "model.safetensors")


def test_a_mixed_run_resumes_exactly_in_the_middle_of_an_epoch(tmp_path):
    flags = {"loss": "bce", "mixup": 0.2, "cutmix": 1.0, "base_op": "lamb", "amp": "bf16"}
    straight = trained(tmp_path, "straight", **flags)
    trained(tmp_path, "halves", max_steps=3, **flags)
    resumed = trained(tmp_path, "halves", **flags)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_only_training_images_are_mixed(tmp_path):
    """With a learning rate of 0, validation gives the same values with and without mixing."""
    for name, flags in (("plain", {}), ("mixed", {"mixup": 1.0})):
        trained(tmp_path, name, base_lr=0.0, epochs=1, **flags)
    plain, mixed = (
        {row["split"]: row["loss"] for row in rows(tmp_path / name)} for name in ("plain", "mixed")
    )
    assert plain["val"] == mixed["val"]
    assert not math.isclose(plain["train"], mixed["train"], rel_tol=1e-6)
