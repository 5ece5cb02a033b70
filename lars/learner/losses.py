"""Losses of classification: sums over the samples of a batch, for labels and for soft targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """The targets (n, num_classes) of labels (n,). Unlike torch's function, the host never waits for the device."""
    targets = torch.zeros(len(labels), num_classes, dtype=dtype, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1.0)


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The sum over samples of the cross-entropy.

    Args:
        logits: Shape (n, classes).
        targets: Labels (n,), or the probability of each class (n, classes).
        label_smoothing: As in torch.nn.functional.cross_entropy.
    """
    return functional.cross_entropy(
        logits, targets, label_smoothing=label_smoothing, reduction="sum"
    )


def binary_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    target_threshold: float | None = None,
    sum_classes: bool = False,
) -> Tensor:
    """The sum over samples of the binary cross-entropy, in which every class is a yes-or-no question.

    For a sample with logits x and targets t of C classes:

        t    = (1 - label_smoothing) * t + label_smoothing / C
        t    = 1 where t > target_threshold, else 0          (if there is a threshold)
        loss = mean over classes of -t log σ(x) - (1 - t) log(1 - σ(x))

    Args:
        logits: Shape (n, classes).
        targets: Labels (n,), or the probability of each class (n, classes).
        label_smoothing: Share of the target that all classes have in common.
        target_threshold: Makes every target 0 or 1. None: targets stay as they are.
        sum_classes: Take the sum over the classes and not their mean.

    References:
        Wightman et al., "ResNet strikes back", arXiv 2110.00476, section 3. Mean, smoothing and threshold are those of
        BinaryCrossEntropy in timm. MosaicML's Composer and MMPreTrain take the sum over the classes.
    """
    classes = logits.shape[1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if targets.ndim == 1:
        targets = one_hot(targets, classes, logits.dtype)
    targets = targets.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / classes
    if target_threshold is not None:
        targets = (targets > target_threshold).to(logits.dtype)
    loss = functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return loss if sum_classes else loss / classes
