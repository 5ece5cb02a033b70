"""The layer-wise trust ratio, of many tensors at a time.

LARS, LAMB, TVLARS and the wrapper all scale a layer's update by

    ratio = coefficient * ‖w‖ / (‖u‖ + penalty * ‖w‖ + eps)

where w is the layer's weight, and u the gradient, the decayed gradient or the update, as the rule says. kernels.c has
the formula once more, for the norms that it has just taken; a test holds one against the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def trust_ratios(
    weight_norm: Tensor,
    update_norm: Tensor,
    *,
    coefficient: float | Tensor = 1.0,
    penalty: float = 0.0,
    eps: float = 0.0,
    max_norm: float | None = None,
    max_ratio: float | None = None,
    clip_to_lr: float | Tensor | None = None,
    zero_norm: str = "one",
) -> Tensor:
    """The trust ratios of tensors with these norms; no value is read back to the host.

    Args:
        weight_norm: ‖w‖ of each tensor, of any shape.
        update_norm: ‖u‖ of each tensor, of the same shape, dtype and device.
        coefficient: The trust coefficient (η of the LARS paper), a float or a 0-dim tensor on the device of the norms.
        penalty: What the denominator gains per unit of ‖w‖, usually the weight decay.
        eps: What is added to the denominator.
        max_norm: Upper bound of ‖w‖ and of ‖u‖ within the quotient.
        max_ratio: Upper bound of the ratio.
        clip_to_lr: The learning rate, a float or a 0-dim tensor, if the ratio is to be min(ratio, lr) / lr, as in LARC.
            At lr = 0, where that would be 0 / 0, the ratio stays as it is: the step is zero in any case, and the
            momentum buffer must not take in the raw gradient.
        zero_norm: The ratio where ‖w‖ or ‖u‖ is zero. "one" and "raw": 1. "formula": what the quotient says, and 0 for
            0 / 0.

    Returns:
        The ratios; nan where ‖u‖ is not finite, so that a broken gradient never passes for a sound one.
    """
    finite = update_norm.isfinite()
    live = (weight_norm > 0) & (update_norm > 0)
    if max_norm is not None:
        weight_norm, update_norm = weight_norm.clamp(max=max_norm), update_norm.clamp(max=max_norm)
    denominator = update_norm + penalty * weight_norm + eps
    ratio = coefficient * weight_norm / denominator
    if zero_norm == "formula":
        ratio = torch.where(denominator > 0, ratio, 0.0)
    if max_ratio is not None:
        ratio = ratio.clamp(max=max_ratio)
    if isinstance(clip_to_lr, Tensor):
        ratio = torch.where(clip_to_lr > 0, ratio.minimum(clip_to_lr) / clip_to_lr, ratio)
    elif clip_to_lr is not None and clip_to_lr > 0:
        ratio = ratio.clamp(max=clip_to_lr) / clip_to_lr
    if zero_norm != "formula":
        ratio = torch.where(live, ratio, 1.0)
    return torch.where(finite, ratio, math.nan)


def one_or_nan(grad_norm: Tensor) -> Tensor:
    """The ratio of tensors that have none: 1, or nan if the gradient is not finite."""
    return torch.where(grad_norm.isfinite(), torch.ones_like(grad_norm), math.nan)
