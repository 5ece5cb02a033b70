"""Barlow Twins (Zbontar et al., 2021): learning features without labels, and their evaluation by a linear classifier.

Two distorted views of each image go through the same network. Its normalised outputs z1 and z2 give the
cross-correlation C = z1ᵀ z2 / B over the B samples that all ranks process at the same time. The loss demands that C
is the identity: equal features for both views, and no two features with the same information.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lars.comm.world import World
from lars.config.barlow_twins import BarlowTwinsConfig, LinearConfig
from lars.errors import UsageError
from lars.learner import classification
from lars.learner.classification import normalised
from lars.learner.task import Batch, Setup
from lars.models.head import freeze_all_but
from lars.models.sync_batch_norm import AllReduce


def pretraining(config: BarlowTwinsConfig, source: Any, world: World, model: nn.Module) -> Setup:
    """Choose the pretraining: the network without its last layer, then the projector.

    Raises:
        UsageError: The source does not deliver two views, or the network does not end with a linear layer.
    """
    if getattr(source, "views", 1) != 2:
        raise UsageError("Barlow Twins needs a data set with two views of each image: --views 2")
    backbone, width = without_head(model, config.model)
    network = BarlowTwinsNet(backbone, projector(width, config.projector_sizes))
    task = BarlowTwins(
        lmbda=config.btlmbda,
        all_reduce=lambda tensor, name: world.all_reduce(tensor, name),
        mean=source.mean,
        std=source.std,
        channels_last=config.channels_last,
    )
    factor = config.lr_biases / config.base_lr if config.base_lr else 1.0
    rates = {name: factor for name, p in network.named_parameters() if p.ndim <= 1}
    return Setup(network, task, rates)


def linear_evaluation(config: LinearConfig, source: Any, world: World, model: nn.Module) -> Setup:
    """Choose classification with a linear layer on the features of a backbone, which may be frozen.

    Raises:
        UsageError: The file of the pretraining is missing, or the network does not end with a linear layer.
    """
    backbone, width = without_head(model, config.model)
    if config.backbone:
        load_backbone(backbone, Path(config.backbone))
    network = LinearNet(backbone, nn.Linear(width, source.num_classes), frozen=config.frozen)
    task = classification.setup(config, source, world, network).task
    rates = {} if config.frozen else {"backbone.": config.lr_backbone / config.base_lr}
    return Setup(network, task, rates)


def without_head(model: nn.Module, name: str) -> tuple[nn.Module, int]:
    """Replace the last linear layer of a classification network by the identity.

    Dropout and other layers without parameters that belong to the same part as the linear layer are removed with it.

    Returns:
        The network, and the number of features that it now returns.

    Raises:
        UsageError: The network has no linear layer. `name` is its name for the message.
    """
    linear = [path for path, part in model.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise UsageError(
            f"--model {name} does not end with a linear layer; use, for example, resnet50"
        )
    path = linear[-1]
    head = model.get_submodule(path)
    assert isinstance(head, nn.Linear)
    parent = path.rpartition(".")[0]
    while parent and _count(model.get_submodule(parent)) == _count(head):
        path, parent = parent, parent.rpartition(".")[0]
    setattr(model.get_submodule(parent), path.rpartition(".")[2], nn.Identity())
    return model, head.in_features


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def projector(width: int, sizes: Sequence[int]) -> nn.Sequential:
    """Build the projector: linear layers without bias, with BatchNorm and ReLU between them.

    The last layer is a BatchNorm without weights, which normalises the outputs for the cross-correlation.

    Args:
        width: Number of features of the backbone.
        sizes: Width of each linear layer. The paper uses 8192, 8192, 8192.
    """
    layers: list[nn.Module] = []
    for size in sizes[:-1]:
        layers += [nn.Linear(width, size, bias=False), nn.BatchNorm1d(size), nn.ReLU(inplace=True)]
        width = size
    layers += [nn.Linear(width, sizes[-1], bias=False), nn.BatchNorm1d(sizes[-1], affine=False)]
    return nn.Sequential(*layers)


class BarlowTwinsNet(nn.Module):
    """A backbone and a projector. The pretraining keeps only the backbone."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        """Join the two parts."""
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalised outputs of shape (n, D) for images of shape (n, 3, height, width)."""
        return self.projector(self.backbone(images))


class LinearNet(nn.Module):
    """A linear classifier on the features of a backbone.

    A frozen backbone always computes as in evaluation, so training does not move its BatchNorm statistics.
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear, *, frozen: bool) -> None:
        """Join the two parts. `frozen`: whether the backbone keeps its values."""
        super().__init__()
        self.backbone, self.head = backbone, head
        # As in published linear evaluations.
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        if frozen:
            freeze_all_but(self, ["head"])

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape (n, classes) for images of shape (n, 3, height, width)."""
        return self.head(self.backbone(images))


def load_backbone(backbone: nn.Module, path: Path) -> None:
    """Load the backbone from the weights of a pretraining.

    Raises:
        UsageError: The file is missing, or it does not hold such a backbone.
    """
    try:
        state = load_file(path)
        own = {
            name.removeprefix("backbone."): tensor
            for name, tensor in state.items()
            if name.startswith("backbone.")
        }
        backbone.load_state_dict(own)
    except (OSError, RuntimeError) as error:
        cause = str(error).splitlines()[0]
        raise UsageError(
            f"--stage linear: the backbone cannot be read from {path} ({cause}); "
            "run --stage pretraining first, with the same flags"
        ) from error


class BarlowTwins:
    """Barlow Twins as a `lars.learner.task.Task`.

    Each micro-batch of a step, taken over all ranks, has its own cross-correlation. Its loss counts once per sample,
    so the loss of a step is the mean over its micro-batches, weighted by their samples. Accumulation thus does not
    equal a larger micro-batch.

    The metric ``correlation`` is the mean of the diagonal of C in percent. In validation, outputs are normalised with
    the running statistics of training. So the correlation is a mean over images, which does not depend on the batches.
    The validation loss does: it has a cross-correlation for each validation batch of each rank.

    Example:
        task = BarlowTwins(lmbda=0.005)
        loss, sums = task.loss_and_sums(network, (views, labels))  # views: (n, 2, 3, height, width)
    """

    scales: Mapping[str, float] = MappingProxyType({"loss": 1.0, "correlation": 100.0})
    best = "correlation"

    def __init__(
        self,
        *,
        lmbda: float,
        all_reduce: AllReduce = lambda tensor, name: tensor,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
        channels_last: bool = True,
    ) -> None:
        """Describe the loss and the images.

        Args:
            lmbda: Weight of the off-diagonal elements of C in the loss.
            all_reduce: Sums a tensor over the ranks.
            mean: Mean of each channel of uint8 images, in units of 0..255.
            std: Standard deviation of each channel, in the same units.
            channels_last: Whether the network gets channels-last images.
        """
        self.lmbda, self.all_reduce, self.mean, self.std = lmbda, all_reduce, mean, std
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        """Copy a batch to the device and normalise uint8 pixels there."""
        views, labels = (part.to(device, non_blocking=True) for part in batch)
        return normalised(views, self.mean, self.std), labels

    def samples_in(self, batch: Batch) -> int:
        """Number of images. The two views of an image count as one."""
        return len(batch[1])

    def loss_and_sums(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return B times the loss of the micro-batch over all ranks, and this rank's sums of the metrics.

        In training all ranks must call this together, a rank without samples with an empty batch. They get the same
        value. Its gradient is that with respect to this rank's samples, and the sum over the ranks is exact.
        """
        views, labels = batch
        first, second = (v.contiguous(memory_format=self.layout) for v in views.unbind(1))
        z1, z2 = model(first), model(second)
        with torch.autocast(z1.device.type, enabled=False):
            if z1.dtype in (torch.bfloat16, torch.float16):
                z1, z2 = z1.float(), z2.float()
            c, count = cross_correlation(z1, z2, self.all_reduce if model.training else _alone)
            loss = barlow_twins_loss(c, self.lmbda)
        own, correlation = len(labels), c.detach().diagonal().mean()
        return count * loss, {"loss": own * loss.detach(), "correlation": own * correlation}


def barlow_twins_loss(c: Tensor, lmbda: float) -> Tensor:
    """Σᵢ (Cᵢᵢ - 1)² + λ Σᵢ≠ⱼ Cᵢⱼ² for a cross-correlation of shape (D, D); equation 1 of the paper."""
    diagonal = c.diagonal()
    return (diagonal - 1).square().sum() + lmbda * (c - diagonal.diag()).square().sum()


def cross_correlation(z1: Tensor, z2: Tensor, all_reduce: AllReduce) -> tuple[Tensor, Tensor]:
    """C = z1ᵀ z2 / B over the samples of all ranks.

    The gradient with respect to `z1` and `z2` is that of a function of the C of all ranks. It needs no communication,
    because every rank computes the same derivative with respect to C.

    Args:
        z1: Normalised outputs for the first views of this rank's samples, shape (n, D). n may be 0.
        z2: The same for the second views.
        all_reduce: Sums a tensor over the ranks.

    Returns:
        C of shape (D, D), and the number of samples B over all ranks.
    """
    c, count = _CrossCorrelation.apply(z1, z2, all_reduce)
    return c, count


class _CrossCorrelation(torch.autograd.Function):
    @staticmethod
    @torch.compiler.disable
    def forward(ctx: Any, z1: Tensor, z2: Tensor, all_reduce: AllReduce) -> tuple[Tensor, Tensor]:
        size = z1.shape[1]
        samples = z1.new_full((1,), len(z1))
        sums = all_reduce(torch.cat([(z1.T @ z2).flatten(), samples]), "cross-correlation")
        count = sums[-1].clone()
        c = sums[:-1].view(size, size) / count.clamp(min=1)
        ctx.save_for_backward(z1, z2, count.clamp(min=1))
        ctx.mark_non_differentiable(count)
        return c, count

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, dc: Tensor, unused: Tensor) -> tuple[Tensor, Tensor, None]:
        z1, z2, count = ctx.saved_tensors
        return z2 @ dc.T / count, z1 @ dc / count, None


def _alone(tensor: Tensor, name: str) -> Tensor:
    return tensor
