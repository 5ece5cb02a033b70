"""The one place that touches torch's private fused kernels, and the guard in front of them.

`torch._fused_sgd_` on the CPU walks the memory of its tensors and ignores their strides: a parameter and a gradient of
different layout give a wrong update without an error. So nothing reaches a kernel that `takes` has not let through.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fused_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    scale: float = 1.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> None:
    """In place: b = momentum * b + scale * (g + weight_decay * p); p -= lr * b, in one pass over memory.

    Without momentum the step is p -= lr * scale * (g + weight_decay * p), and ``buffers`` is not read.
    With nesterov, which the kernel only knows with scale = 1, p -= lr * (g + weight_decay * p + momentum * b).
    """
    torch._fused_sgd_(
        params,
        grads,
        buffers if momentum else [],
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr if momentum else lr * scale,
        dampening=1.0 - scale if momentum else 0.0,
        nesterov=nesterov,
        maximize=maximize,
        is_first_step=False,
    )


def scale_survives(scale: float, dtype: torch.dtype) -> bool:
    """Whether ``1 - (1 - scale)``, which is what the kernel works with, is still ``scale`` to the precision of dtype."""
    tolerance = 1e-12 if dtype == torch.float64 else 1e-8
    return abs((1.0 - (1.0 - scale)) - scale) <= tolerance * abs(scale)


def takes(param: Tensor, *others: Tensor) -> bool:
    """Whether a fused CPU kernel may walk these tensors side by side: dense memory, equal strides and dtypes."""
    strides, dtype = param.stride(), param.dtype
    return (
        dtype in DTYPES
        and (param.is_contiguous() or _dense(param))
        and all(other.stride() == strides and other.dtype == dtype for other in others)
    )


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _probe() -> bool:
    """Whether this torch has the fused CPU kernels, and they compute what this project takes them to compute."""
    param, grad, buffer = torch.tensor([[2.0], [3.0], [5.0]], dtype=torch.float64)
    try:
        fused_sgd([param], [grad], [buffer], lr=0.5, momentum=0.5, weight_decay=0.5, scale=0.25)
    except (AttributeError, RuntimeError, TypeError):
        return False
    # b = 0.5 * 5 + 0.25 * (3 + 0.5 * 2); p = 2 - 0.5 * b
    return buffer.item() == 3.5 and param.item() == 0.25


AVAILABLE = _probe()
