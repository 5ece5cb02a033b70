"""The one place that touches torch's private fused kernels, and the guard in front of them.

On the CPU, `torch._fused_sgd_` and `torch._fused_adamw_` walk the memory of their tensors and
ignore strides: a parameter and a gradient of different layout give a wrong update and no error.
`torch._fused_sgd_` is moreover wrong in bfloat16 and float16 (torch 2.13: momentum buffers of 16
elements and more get errors as large as the values). So nothing goes to a kernel that `takes` has
not let through.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)


def takes(param: Tensor, *others: Tensor) -> bool:
    """Whether a kernel may walk these CPU tensors side by side: equal strides, no gaps."""
    strides, dtype = param.stride(), param.dtype
    for other in others:
        if other.stride() != strides or other.dtype != dtype:
            return False
    return dtype in DTYPES and (param.is_contiguous() or _is_dense(param))


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def flat(tensor: Tensor) -> Tensor:
    """The elements of a tensor without gaps, as a vector in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def norm(vector: Tensor) -> float:
    """L2 norm of a `flat` tensor.

    On large float32 tensors a dot product is faster and 20 times more exact than
    `torch.linalg.vector_norm`.
    """
    return math.sqrt(torch.dot(vector, vector).item())


class Scratch:
    """Memory for intermediate results that is kept from step to step.

    To have the kernel of the operating system map and clear it anew costs a tenth of LAMB's step.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._vectors: dict[tuple[str, torch.dtype], Tensor] = {}

    def like(self, tensor: Tensor, use: str) -> Tensor:
        """A CPU tensor of the shape and strides of this one, which has no gaps.

        It shares its memory with all others of this ``use`` and holds what was last left there, or
        zeros.
        """
        key = use, tensor.dtype
        vector = self._vectors.get(key)
        if vector is None or vector.numel() < tensor.numel():
            vector = self._vectors[key] = torch.zeros(tensor.numel(), dtype=tensor.dtype)
        return vector.as_strided(tensor.shape, tensor.stride())


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
    """SGD in one pass over memory, in place.

    With d = g + weight_decay * p: b = momentum * b + scale * d, and p -= lr * b. With nesterov,
    which needs scale = 1: p -= lr * (d + momentum * b). Without momentum there are no buffers, and
    p -= lr * scale * d.
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
    """Whether 1 - (1 - scale), which is what `fused_sgd` computes with, still is ``scale``.

    To the precision of ``dtype``, that is: a small scale loses its last digits there.
    """
    tolerance = 1e-12 if dtype == torch.float64 else 1e-8
    return abs((1.0 - (1.0 - scale)) - scale) <= tolerance * abs(scale)


def fused_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW in one pass over memory, in place.

    p = (1 - lr * weight_decay) * p - lr * m̂ / (√v̂ + eps), after the update of the averages m and
    v. The bias correction is that of ``steps``; steps of inf mean none.
    """
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def _probe() -> bool:
    """Whether this torch has the kernels, and they compute what the functions above promise."""
    p, g, b, m, v = torch.tensor([[2.0], [3.0], [5.0], [1.0], [4.0]], dtype=torch.float64)
    no_correction = torch.tensor(math.inf)
    try:
        fused_sgd([p], [g], [b], lr=0.5, momentum=0.5, weight_decay=0.5, scale=0.25)
        fused_adamw(
            [p], [g], [m], [v], [no_correction],
            lr=-1.0, beta1=0.5, beta2=0.5, eps=0.0, weight_decay=0.0,
        )  # fmt: skip
    except (AttributeError, RuntimeError, TypeError):
        return False
    # b = 0.5 * 5 + 0.25 * (3 + 0.5 * 2); p = 2 - 0.5 * b
    # m = 0.5 * 1 + 0.5 * 3; v = 0.5 * 4 + 0.5 * 9; p += m / √v
    return b.item() == 3.5 and math.isclose(p.item(), 0.25 + 2.0 / math.sqrt(6.5), rel_tol=1e-15)


AVAILABLE = _probe()
