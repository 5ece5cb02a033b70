"""The layer-wise trust ratio, for many tensors at once.

LARS, LAMB, TVLARS and the wrapper scale the update of each layer by

    ratio = coefficient * ‖w‖ / (‖u‖ + penalty * ‖w‖ + eps)

where w is the weight of the layer, and u is the gradient, the gradient plus weight decay, or the update, depending on
the rule. kernels.c implements the same formula for the norms that it computes, and a test compares the two.
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
    """Compute the trust ratios of tensors with these norms, without reading a value back to the host.

    Args:
        weight_norm: ‖w‖ of each tensor, of any shape.
        update_norm: ‖u‖ of each tensor, of the same shape, dtype and device.
        coefficient: The trust coefficient (η of the LARS paper), a float or a 0-dim tensor on the device of the norms.
        penalty: Factor of ‖w‖ in the denominator, usually the weight decay.
        eps: Added to the denominator.
        max_norm: Upper bound of ‖w‖ and of ‖u‖ in the quotient.
        max_ratio: Upper bound of the ratio.
        clip_to_lr: The learning rate, a float or a 0-dim tensor, if the ratio is min(ratio, lr) / lr as in LARC. At
            lr = 0, where that is 0 / 0, the ratio is not clipped: the weight does not move in this step, and an
            unscaled gradient must not enter the momentum buffer.
        zero_norm: The ratio where ‖w‖ or ‖u‖ is zero. "one" and "raw": 1. "formula": the quotient, and 0 for 0 / 0.

    Returns:
        The ratios. A ratio is nan where ‖u‖ is not finite, so that a nonfinite gradient is never hidden.
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
    """The ratios of tensors without a trust ratio: 1, or nan if the gradient is not finite."""
    return torch.where(grad_norm.isfinite(), torch.ones_like(grad_norm), math.nan)
