"""Operations on lists of tensors that the update rules share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

Tensors = list[Tensor]
Kind = tuple[torch.device, torch.dtype, type[Tensor]]


def by_kind(params: Tensors) -> Mapping[Kind, Sequence[int]]:
    """Group the positions of the parameters by device, dtype, and class (such as DTensor)."""
    devices, dtypes = {p.device for p in params}, {p.dtype for p in params}
    classes = {type(p) for p in params}
    if len(devices) == len(dtypes) == len(classes) == 1:  # the usual case
        return {(devices.pop(), dtypes.pop(), classes.pop()): range(len(params))}
    kinds: dict[Kind, list[int]] = {}
    for i, param in enumerate(params):
        kinds.setdefault((param.device, param.dtype, type(param)), []).append(i)
    return kinds


def pick(tensors: Tensors, which: Sequence[int]) -> Tensors:
    """Return the tensors at these positions, or an empty list if there are no tensors at all."""
    if len(which) == len(tensors):
        return tensors
    return [tensors[i] for i in which] if tensors else []


def on_device(value: Any, device: torch.device) -> Any:
    """Move the value to the device if it is a tensor; return a plain number as it is."""
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def norm_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which to compute a norm: float64, as in the CPU kernels.

    In float32, squares overflow above 1e19 and vanish below 1e-23. Apple's GPUs have no float64.
    """
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def factor_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a factor of a tensor: its own, and at least float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def norm(tensor: Tensor) -> Tensor:
    """L2 norm, a 0-dim tensor."""
    return vector_norm(tensor, dtype=norm_dtype(tensor))


def norms(tensors: Tensors) -> Tensor:
    """L2 norms of tensors that share a device and dtype, as a vector."""
    return torch.stack(torch._foreach_norm(tensors, dtype=norm_dtype(tensors[0])))


def clones(*lists: Tensors) -> list[Tensors]:
    """Copy every tensor of every list."""
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def restore_where_not(keep: Tensor, old: Tensors, new: Tensors) -> None:
    """Write the old value back into each new tensor whose element of ``keep`` is False."""
    chosen = [torch.where(*three) for three in zip(keep.unbind(), new, old, strict=True)]
    torch._foreach_copy_(new, chosen)


def add_scaled(tensors: Tensors, others: Tensors, factor: Any) -> None:
    """Add ``factor * other`` to each tensor in one pass.

    Args:
        tensors: The tensors to change.
        others: What to add, one for each tensor.
        factor: One factor for all, or a vector with one factor for each tensor.
    """
    if not isinstance(factor, Tensor):
        torch._foreach_add_(tensors, others, alpha=factor)
        return
    if tensors[0].dtype == torch.float16:
        torch._foreach_add_(tensors, scaled(others, factor))
        return
    factor = factor.to(factor_dtype(tensors[0]))
    each = factor.unbind() if factor.ndim > 0 else [factor] * len(tensors)
    torch._foreach_addcmul_(tensors, others, each)


def scaled(tensors: Tensors, factor: Any) -> Tensors:
    """Return new tensors of the same dtypes, multiplied by a factor.

    Args:
        tensors: The tensors, which do not change.
        factor: One factor for all, or a vector with one factor for each tensor.
    """
    each = isinstance(factor, Tensor) and factor.ndim > 0
    if isinstance(factor, Tensor):
        factor = factor.to(factor_dtype(tensors[0]))
    # A ratio can exceed the range of float16 where the product does not.
    wide = [t.float() for t in tensors] if tensors[0].dtype == torch.float16 else tensors
    products = torch._foreach_mul(wide, factor.unbind() if each else factor)
    # The product of a 0-dim tensor takes the factor's dtype if that is wider.
    return [product.to(tensor.dtype) for product, tensor in zip(products, tensors, strict=True)]
