"""The writes of a foreach update, which a flag on the device can switch off.

``found_inf`` is a 0-dim float32 tensor on the device of the parameters, as in torch's fused optimizers. If it is 1, the
functions change no bit of the parameters and buffers. If it is 0 or None, they make their changes. The host does not
read it, so it does not wait for the device.

torch's fused SGD kernel reads the flag, and it computes momentum and weights in one pass. So the condition costs no
memory traffic. The kernel takes no fake tensors, no DTensors and no mixed layouts, and on CPUs it is wrong for 16-bit
floats (torch 2.13). Those use plain operations, and the old values are copied back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lars.optim.steps.tensors import Tensors, add_scaled, clones, factor_dtype, restore_where_not


def descend(
    params: Tensors,
    updates: Tensors,
    buffers: Tensors,
    *,
    lr: Any,
    momentum: float = 0.0,
    nesterov: bool = False,
    found_inf: Tensor | None = None,
) -> None:
    """Update momentum buffers b and parameters p in place: b = momentum * b + u, then p = p - lr * b.

    Args:
        params: The parameters, which share a device and dtype.
        updates: u of each parameter, which does not change.
        buffers: b of each parameter. Empty without momentum: p = p - lr * u.
        lr: One rate for all, a float or a 0-dim tensor, or a vector with one rate for each parameter.
        momentum: Factor of the buffers.
        nesterov: Whether p = p - lr * (u + momentum * b).
        found_inf: The flag; see the module.
    """
    lists = (params, updates, buffers) if buffers else (params, updates)
    if not _fits_kernel(*lists) or _is_imprecise(lr, params[0]):
        before = clones(params, buffers) if found_inf is not None else []
        _descend_plainly(params, updates, buffers, lr, momentum, nesterov)
        for old, new in zip(before, (params, buffers), strict=bool(before)):
            keep_old_where(found_inf, old, new)
        return
    options = {"momentum": momentum, "nesterov": nesterov, "found_inf": found_inf}
    if not isinstance(lr, Tensor):
        _kernel(params, updates, buffers, lr=float(lr), **options)
        return
    lr = lr.to(factor_dtype(params[0]))
    if lr.ndim == 0:
        _kernel(params, updates, buffers, lr=lr, **options)
        return
    for i, rate in enumerate(lr.unbind()):  # the kernel has one rate for all tensors of a call
        _kernel(params[i : i + 1], updates[i : i + 1], buffers[i : i + 1], lr=rate, **options)


def blend(averages: Tensors, values: Tensors, weight: float, found_inf: Tensor | None) -> None:
    """Move averages towards values in place: a = a + weight * (v - a), unless the flag is set."""
    if found_inf is None:
        torch._foreach_lerp_(averages, values, weight)
    elif _fits_kernel(averages, values):
        # p - lr * (weight_decay * p - g) with weight_decay = 1 and lr = weight.
        options = {"weight_decay": 1.0, "maximize": True, "found_inf": found_inf}
        _kernel(averages, values, [], lr=weight, **options)
    else:
        before = clones(averages)
        torch._foreach_lerp_(averages, values, weight)
        keep_old_where(found_inf, before[0], averages)


def replace_by(old: Tensors, new: Tensors, found_inf: Tensor) -> None:
    """Write new values into old tensors in place, unless the flag is set."""
    is_set = found_inf != 0
    for target, value in zip(old, new, strict=True):
        torch.where(is_set, target, value, out=target)


def keep_old_where(found_inf: Tensor | None, old: Tensors, new: Tensors) -> None:
    """Write the old values back into the new tensors if the flag is set."""
    if new and found_inf is not None:
        restore_where_not((found_inf == 0).expand(len(new)), old, new)


def _descend_plainly(
    params: Tensors, updates: Tensors, buffers: Tensors, lr: Any, momentum: float, nesterov: bool
) -> None:
    if buffers:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, updates)
        nested = torch._foreach_add(updates, buffers, alpha=momentum) if nesterov else buffers
        updates = list(nested)
    add_scaled(params, updates, -lr)


def _kernel(params: Tensors, grads: Tensors, buffers: Tensors, **options: Any) -> None:
    """Call the fused SGD kernel of torch."""
    rest = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False, "maximize": False}
    fixed = {"dampening": 0.0, "is_first_step": False}
    torch._fused_sgd_(params, grads, buffers, **rest | fixed | options)


def _fits_kernel(*lists: Tensors) -> bool:
    """Whether the kernel computes correctly with these lists. It ignores strides, or refuses them."""
    first = lists[0][0]
    if torch.compiler.is_compiling() or first.device.type not in ("cpu", "cuda"):
        return False
    if first.dtype not in (torch.float32, torch.float64):
        return False
    return all(_are_alike(*tensors) for tensors in zip(*lists, strict=True))


def _are_alike(first: Tensor, *others: Tensor) -> bool:
    """Whether plain tensors have the same dtype and the same dense layout."""
    is_dense = first.is_contiguous() or first.is_contiguous(memory_format=torch.channels_last)
    return is_dense and all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype == first.dtype
        and tensor.stride() == first.stride()
        for tensor in (first, *others)
    )


def _is_imprecise(lr: Any, param: Tensor) -> bool:
    """Whether the kernel would round the rate: on a GPU it reads tensors of rates as float32."""
    return isinstance(lr, Tensor) and param.dtype == torch.float64 and param.is_cuda
