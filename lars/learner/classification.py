"""Image classification: cross-entropy with label smoothing, top-1 and top-5 accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lars.comm.world import World
from lars.config.config import Config
from lars.errors import UsageError
from lars.learner.task import Batch, Setup


def setup(config: Config, source: Any, world: World, model: nn.Module) -> Setup:
    """Choose classification with the network as it is.

    Raises:
        UsageError: The source delivers several views of each image.
    """
    if getattr(source, "views", 1) != 1:
        raise UsageError(
            f"--views {source.views}: classification takes one view of each image; leave the flag out"
        )
    task = Classification(
        mean=source.mean,
        std=source.std,
        label_smoothing=config.label_smoothing,
        channels_last=config.channels_last,
    )
    return Setup(model, task)


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
        channels_last: bool = True,
    ) -> None:
        """Describe the images.

        Args:
            mean: Mean of each channel of uint8 images, in units of 0..255.
            std: Standard deviation of each channel, in the same units.
            label_smoothing: As in torch.nn.functional.cross_entropy.
            channels_last: Whether to keep the channels-last layout in which loaders deliver images.
        """
        self.channels_last = channels_last
        self.mean, self.std, self.label_smoothing = mean, std, label_smoothing

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        """Copy a batch to the device and normalise uint8 pixels there: (x - mean) / std in each channel."""
        images, labels = (part.to(device, non_blocking=True) for part in batch)
        images = normalised(images, self.mean, self.std)
        return (images if self.channels_last else images.contiguous()), labels

    def samples_in(self, batch: Batch) -> int:
        """Number of images."""
        return len(batch[1])

    def loss_and_sums(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sums of the losses and of the hits. With fewer than five classes, every sample is a top-5 hit."""
        images, labels = batch
        logits = model(images)
        loss = nn.functional.cross_entropy(
            logits, labels, label_smoothing=self.label_smoothing, reduction="sum"
        )
        best = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        return loss, {"loss": loss, "top1": hits[:, 0].sum(), "top5": hits.sum()}
