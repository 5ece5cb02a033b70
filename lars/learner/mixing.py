"""Mixup and CutMix: every training image is mixed with its neighbour in the micro-batch, and so are their targets.

The host draws the shares and boxes, and the device mixes. So the host never waits for the device.
"""

from __future__ import annotations

import math
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from lars.learner.losses import one_hot
from lars.learner.task import Batch


class Box(NamedTuple):
    """The part of an image in rows top to bottom - 1 and columns left to right - 1."""

    top: int
    left: int
    bottom: int
    right: int


class Mix(NamedTuple):
    """How the images of a micro-batch are mixed.

    Attributes:
        share: The part of a mixed image that comes from the image itself, from 0 to 1. The rest is its neighbour's.
        box: CutMix: the part that is its neighbour's. None: mixup, the weighted mean of both images.
    """

    share: float
    box: Box | None = None


def draw_mix(
    random: Random, height: int, width: int, *, mixup: float = 0.0, cutmix: float = 0.0
) -> Mix:
    """Draw how to mix a micro-batch. If both methods are on, either is used with the same probability.

    Args:
        random: The source of all randomness.
        height: Height of the images in pixels.
        width: Their width.
        mixup: Both parameters of the Beta distribution of mixup's share. 0: off.
        cutmix: The same for the share of the area in CutMix. The box is clipped at the edges of the image, and
            `Mix.share` is the share that remains.

    References:
        Zhang et al., "mixup", arXiv 1710.09412. Yun et al., "CutMix", arXiv 1905.04899. The box and the choice
        between both are those of torchvision's references and of timm.
    """
    if mixup and not (cutmix and random.random() < 0.5):
        return Mix(random.betavariate(mixup, mixup))
    half = 0.5 * math.sqrt(1 - random.betavariate(cutmix, cutmix))
    x, y = random.randrange(width), random.randrange(height)
    across, down = int(half * width), int(half * height)
    box = Box(max(y - down, 0), max(x - across, 0), min(y + down, height), min(x + across, width))
    area = (box.bottom - box.top) * (box.right - box.left)
    return Mix(1 - area / (width * height), box)


def mixed_images(images: Tensor, mix: Mix) -> Tensor:
    """Mix images (n, channels, height, width) with their predecessors, the first one with the last one.

    The result is a new tensor in the same memory layout. It equals that of torchvision's v2.MixUp and v2.CutMix.
    """
    if mix.box is None:
        return _predecessors(images).mul_(1 - mix.share).add_(images.mul(mix.share))
    top, left, bottom, right = mix.box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = _predecessors(images[..., top:bottom, left:right])
    return mixed


def mixed_targets(labels: Tensor, mix: Mix, num_classes: int, dtype: torch.dtype) -> Tensor:
    """The targets (n, num_classes) of images that were mixed in the same way. `labels` has the shape (n,)."""
    targets = one_hot(labels, num_classes, dtype)
    return _predecessors(targets).mul_(1 - mix.share).add_(targets.mul(mix.share))


def _predecessors(rows: Tensor) -> Tensor:
    """`rows` rolled by one. Unlike torch.roll, this keeps the channels-last layout."""
    return torch.cat([rows[-1:], rows[:-1]]) if len(rows) > 1 else rows.clone()


class Mixing:
    """Mixes the images and the labels of training batches."""

    def __init__(self, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        """Choose the methods; see `draw_mix`. At least one of them must be on."""
        self.num_classes, self.mixup, self.cutmix = num_classes, mixup, cutmix

    def __call__(self, batch: Batch, random: Random) -> Batch:
        """Return mixed images and soft targets (n, classes). Any number of images may be in the batch."""
        images, labels = batch
        height, width = images.shape[-2:]
        mix = draw_mix(random, height, width, mixup=self.mixup, cutmix=self.cutmix)
        targets = mixed_targets(labels, mix, self.num_classes, images.dtype)
        return mixed_images(images, mix), targets
