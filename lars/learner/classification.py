"""Image classification: cross-entropy or binary cross-entropy, top-1 and top-5 accuracy, mixed training images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lars.comm.world import World
from lars.config.config import Config
from lars.errors import UsageError
from lars.learner.losses import binary_cross_entropy, cross_entropy
from lars.learner.mixing import Mixing
from lars.learner.task import Batch, Setup
from lars.models.head import freeze_all_but, heads_of


def setup(config: Config, source: Any, world: World, model: nn.Module) -> Setup:
    """Choose classification with the network as it is, or with all but its head frozen.

    Raises:
        UsageError: The source delivers several views of each image, the targets of all classes would be equal, or the
            network to freeze has no head.
    """
    if getattr(source, "views", 1) != 1:
        raise UsageError(
            f"--views {source.views}: classification takes one view of each image; leave the flag out"
        )
    if config.freeze_backbone:
        freeze_backbone(model, config.model, source.num_classes)
    task = Classification(
        mean=source.mean,
        std=source.std,
        label_smoothing=config.label_smoothing,
        loss=loss_function(config, source.num_classes),
        channels_last=config.channels_last,
    )
    if not config.mixes:
        return Setup(model, task)
    mixing = Mixing(source.num_classes, mixup=config.mixup, cutmix=config.cutmix)
    return Setup(model, task, augment=mixing)


def loss_function(config: Config, num_classes: int) -> Callable[..., Tensor]:
    """The loss that the flags choose; see `lars.learner.losses`.

    Raises:
        UsageError: --bce-target-threshold is so low that the target of every class would be 1.
    """
    threshold = config.bce_target_threshold
    if config.loss == "ce":
        return cross_entropy
    if threshold is not None and threshold < config.label_smoothing / num_classes:
        raise UsageError(
            f"--bce-target-threshold {threshold:g} is below --label-smoothing {config.label_smoothing:g} / "
            f"{num_classes} classes, so the target of every class would be 1; raise it"
        )
    return partial(binary_cross_entropy, target_threshold=threshold, sum_classes=config.bce_sum)


def freeze_backbone(model: nn.Module, name: str, num_classes: int) -> None:
    """Train only the head of a network, whose name is `name` for the message.

    Raises:
        UsageError: The network has no layer that can be recognised as its head.
    """
    heads = heads_of(model, num_classes)
    if not heads:
        raise UsageError(
            f"--freeze-backbone: the head of --model {name} is not recognised, because its last linear or "
            f"convolutional layer does not have {num_classes} outputs; leave the flag out, or give it a method "
            "get_classifier() that returns its head"
        )
    freeze_all_but(model, heads)


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x - mean) / std in each channel of uint8 images of shape (..., 3, height, width). Floats are returned as is."""
    if images.dtype != torch.uint8:
        return images
    shift, scale = (_per_channel(tuple(v), images.device) for v in (mean, std))
    return images.float().sub_(shift).div_(scale)


@lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The values as a tensor of shape (3, 1, 1). It is kept, because the host waits for a copy to a GPU."""
    return torch.tensor(values, device=device).view(3, 1, 1)


class Classification:
    """Image classification as a `lars.learner.task.Task`."""

    scales: Mapping[str, float] = MappingProxyType({"loss": 1.0, "top1": 100.0, "top5": 100.0})
    best = "top1"

    def __init__(
        self,
        *,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
        label_smoothing: float = 0.0,
        loss: Callable[..., Tensor] = cross_entropy,
        channels_last: bool = True,
    ) -> None:
        """Describe the images and the loss.

        Args:
            mean: Mean of each channel of uint8 images, in units of 0..255.
            std: Standard deviation of each channel, in the same units.
            label_smoothing: As in torch.nn.functional.cross_entropy.
            loss: One of the functions of `lars.learner.losses`. It is called with logits, targets and label_smoothing.
            channels_last: Whether to keep the channels-last layout in which loaders deliver images.
        """
        self.channels_last = channels_last
        self.mean, self.std = mean, std
        self.label_smoothing, self.loss = label_smoothing, loss

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        """Copy a batch to the device and normalise uint8 pixels there: (x - mean) / std in each channel."""
        images, labels = (part.to(device, non_blocking=True) for part in batch)
        images = normalised(images, self.mean, self.std)
        return (images if self.channels_last else images.contiguous()), labels

    def samples_in(self, batch: Batch) -> int:
        """Number of images."""
        return len(batch[1])

    def loss_and_sums(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sums of the losses and of the hits. With fewer than five classes, every sample is a top-5 hit.

        A hit of a mixed image is its dominant label, which is the class with the largest target.
        """
        images, targets = batch
        logits = model(images)
        loss = self.loss(logits, targets, label_smoothing=self.label_smoothing)
        labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
        best = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        return loss, {"loss": loss, "top1": hits[:, 0].sum(), "top5": hits.sum()}
