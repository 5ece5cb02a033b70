"""The kernels of kernels.c on lists of CPU tensors, and the guard in front of them.

A kernel walks the memory of its tensors side by side and knows nothing of strides: a parameter and a gradient of
different layout would give a wrong update and no error. So nothing goes to a kernel that `takes` has not let through.
"""

from __future__ import annotations

import functools
import math
import warnings
from ctypes import CDLL, Array, Structure, byref, c_double, c_int, c_size_t, c_void_p
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lars.optim.compiler import CompilerError, compiled

REALS = {torch.float32: "float", torch.float64: "double"}
PLAIN = (Tensor, nn.Parameter)


class _Trust(Structure):
    _fields_ = (
        *((name, c_double) for name in ("coefficient", "penalty", "eps")),
        *((name, c_double) for name in ("max_norm", "max_ratio", "clip_to_lr")),
        ("formula", c_int),
    )


class _Lars(Structure):
    _fields_ = (
        ("trust", _Trust),
        *((name, c_double) for name in ("lr", "momentum", "weight_decay", "max_element", "sign")),
        *((name, c_int) for name in ("lr_inside", "ratio_inside", "adapt", "watch", "joint")),
        *((name, c_int) for name in ("raw", "skip", "nesterov")),
    )


class _Lamb(Structure):
    _fields_ = (
        ("trust", _Trust),
        *((name, c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
        *((name, c_double) for name in ("max_weight_norm", "clip")),
        *((name, c_int) for name in ("adapt", "decoupled")),
    )


@functools.cache
def lacking() -> str:
    """Why the kernels cannot be had, "" if they can; compiles them if need be."""
    try:
        for dtype in REALS:
            _library(dtype)
    except (CompilerError, OSError) as error:
        return str(error)
    return ""


@functools.cache
def available() -> bool:
    """Whether the kernels are there; compiles them if need be, and warns if that fails."""
    if lacking():
        warnings.warn(
            f"the optimizers' CPU kernels cannot be compiled: {lacking()}. A plain loop takes their place, several "
            "times slower on a CPU; on a GPU nothing changes.",
            RuntimeWarning,
            stacklevel=2,
        )
    return not lacking()


@functools.cache
def _library(dtype: torch.dtype) -> CDLL:
    return declared(compiled(REALS[dtype]))


def declared(library: CDLL) -> CDLL:
    """The library, with the types of its functions."""
    for function, pointers in ((library.squares, 3), (library.lars, 5), (library.lamb, 8)):
        function.argtypes = [c_size_t, *[c_void_p] * pointers, c_int]
        function.restype = None
    return library


def takes(param: Tensor, *others: Tensor) -> bool:
    """Whether a kernel may walk these side by side: CPU tensors of one dtype, shape and layout, without gaps."""
    dtype, shape = param.dtype, param.shape
    if dtype not in REALS:
        return False
    contiguous = True
    for tensor in (param, *others):
        # A subclass may keep its values elsewhere, a negated view the opposite of them.
        if type(tensor) not in PLAIN or not tensor.is_cpu or tensor.is_neg():
            return False
        if tensor.dtype != dtype or tensor.shape != shape:
            return False
        if not _has_memory(tensor):
            return False
        contiguous = contiguous and tensor.is_contiguous()
    return contiguous or (_is_dense(param) and all(_same_order(param, other) for other in others))


def _has_memory(tensor: Tensor) -> bool:
    """Whether the elements are at an address; those of torch.func's wrappers and of symbolic zeros are at none."""
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        return False
    return address % tensor.itemsize == 0 and (address != 0 or tensor.numel() == 0)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _same_order(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike; the stride of a single element says nothing."""
    triples = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or a == b for size, a, b in triples)


def squares(tensors: list[Tensor]) -> list[float]:
    """The sum of squares of each tensor."""
    sums = (c_double * len(tensors))()
    lists = (_sizes(tensors), _pointers(tensors))
    _library(tensors[0].dtype).squares(len(tensors), *lists, sums, torch.get_num_threads())
    return list(sums)


def lars(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    *,
    coefficient: float,
    penalty: float,
    eps: float,
    max_norm: float | None,
    max_ratio: float | None,
    clip_to_lr: float | None,
    zero_norm: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    max_element: float | None,
    inside: str,
    joint: bool,
    adapt: bool,
    watch: bool,
    skip: bool,
    nesterov: bool,
    maximize: bool,
) -> None:
    """The step of `lars.optim.update.update_loop`; the options are those of a `Rule` and of `trust_ratios`.

    ``joint``: the denominator has the norm of the decayed gradient. ``watch``: the gradient's norm is looked at where
    there is no trust ratio. ``skip``: a tensor with a broken gradient is left as it is.
    """
    trust = _trust(coefficient, penalty, eps, max_norm, max_ratio, clip_to_lr, zero_norm)
    rule = _Lars(
        trust,
        lr,
        momentum,
        weight_decay,
        _bound(max_element),
        -1.0 if maximize else 1.0,
        inside == "both",
        inside != "none",
        adapt,
        watch,
        adapt and joint,
        adapt and zero_norm == "raw",
        skip,
        nesterov,
    )
    _library(params[0].dtype).lars(
        len(params),
        _sizes(params),
        _pointers(params),
        _pointers(grads),
        _pointers(buffers) if buffers else None,
        byref(rule),
        _threads(params),
    )
    increment_version([*params, *buffers])


def lamb(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    scales: list[tuple[float, float]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    adapt: bool,
    max_weight_norm: float | None,
    max_ratio: float | None,
    clip: float,
) -> None:
    """The step of `lars.optim.lamb.lamb_loop`; the options are those of its `Rule`.

    ``scales``: m̂ / m and √v̂ / √v of each tensor. ``clip``: what the gradients are multiplied by.
    """
    rule = _Lamb(
        _trust(1.0, 0.0, 0.0, None, max_ratio, None, "one"),
        lr,
        *betas,
        eps,
        weight_decay,
        _bound(max_weight_norm),
        clip,
        adapt,
        decoupled,
    )
    _library(params[0].dtype).lamb(
        len(params),
        _sizes(params),
        *map(_pointers, (params, grads, exp_avgs, exp_avg_sqs)),
        _numbers([m_scale for m_scale, _ in scales]),
        _numbers([v_scale for _, v_scale in scales]),
        byref(rule),
        _threads(params),
    )
    increment_version([*params, *exp_avgs, *exp_avg_sqs])


def _threads(params: list[Tensor]) -> int:
    """As many as torch has; one if parameters share memory (one is listed twice, say): they take turns then."""
    threads = torch.get_num_threads()
    if threads > 1:
        spans = sorted((param.data_ptr(), param.nbytes) for param in params)
        apart = all(start + length <= after for (start, length), (after, _) in pairwise(spans))
        threads = threads if apart else 1
    return threads


def _trust(
    coefficient: float,
    penalty: float,
    eps: float,
    max_norm: float | None,
    max_ratio: float | None,
    clip_to_lr: float | None,
    zero_norm: str,
) -> _Trust:
    bounds = (_bound(max_norm), _bound(max_ratio))
    return _Trust(coefficient, penalty, eps, *bounds, clip_to_lr or 0.0, zero_norm == "formula")


def _bound(value: float | None) -> float:
    return math.inf if value is None else value


def _pointers(tensors: list[Tensor]) -> Array[c_void_p]:
    return (c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _sizes(tensors: list[Tensor]) -> Array[c_size_t]:
    return (c_size_t * len(tensors))(*[tensor.numel() for tensor in tensors])


def _numbers(values: list[float]) -> Array[c_double]:
    return (c_double * len(values))(*values)
