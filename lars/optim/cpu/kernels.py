"""The kernels of kernels.c for lists of CPU tensors, and the guard in front of them.

A kernel walks the memory of its tensors side by side and ignores strides. A parameter and a gradient of different
layout would give a wrong update without an error. Therefore pass only tensors that `takes` accepts.
"""

from __future__ import annotations

import functools
import math
import warnings
from array import array
from ctypes import CDLL, Array, Structure, byref, c_double, c_int, c_size_t, c_void_p
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils.weak import WeakIdKeyDictionary

from lars.optim.cpu.compiler import CompilerError, compiled
from lars.optim.steps.adam import AdamRule
from lars.optim.steps.sgd import SGDRule
from lars.optim.steps.trust import trust_ratios

try:  # It is not public. torch.compile uses it to recognize the inputs of a compiled function.
    from torch._C._dynamo import guards

    _TensorGuards: Any = guards.TensorGuards
except (ImportError, AttributeError):
    _TensorGuards = None

REALS = {torch.float32: "float", torch.float64: "double"}
TENSOR_TYPES = (Tensor, nn.Parameter)
# The guards of tensors that a kernel takes, by the first of them, which is a parameter, and by their number.
_accepted: WeakIdKeyDictionary = WeakIdKeyDictionary()
RATIO_DEFAULTS: dict[str, Any] = trust_ratios.__kwdefaults__ or {}


class _Trust(Structure):
    """``struct trust`` of kernels.c; the names are the options of `trust_ratios`, in their order."""

    _fields_ = (
        *((name, c_double) for name in RATIO_DEFAULTS if name != "zero_norm"),
        ("formula", c_int),
    )


class _Lars(Structure):
    """``struct lars`` of kernels.c; the names are attributes of `SGDRule`."""

    _fields_ = (
        ("trust", _Trust),
        *((name, c_double) for name in ("lr", "momentum", "weight_decay", "max_element", "sign")),
        *((name, c_int) for name in ("lr_inside", "ratio_inside", "adapt", "watch", "joint")),
        *((name, c_int) for name in ("raw", "skip", "nesterov")),
    )


class _Lamb(Structure):
    """``struct lamb`` of kernels.c; the names are attributes of `AdamRule`."""

    _fields_ = (
        ("trust", _Trust),
        *((name, c_double) for name in ("lr", "beta1", "beta2", "eps", "decay", "coupled_decay")),
        *((name, c_double) for name in ("max_weight_norm", "clip")),
        ("adapt", c_int),
    )


_Struct = TypeVar("_Struct", _Lars, _Lamb)


@functools.cache
def compile_error() -> str:
    """Compile the kernels if necessary; return why they are unavailable, or "" if they work."""
    try:
        for dtype in REALS:
            _library(dtype)
    except (CompilerError, OSError) as error:
        return str(error)
    return ""


@functools.cache
def available() -> bool:
    """Whether the kernels work. Compiles them if necessary, and warns if that fails."""
    if compile_error():
        warnings.warn(
            f"the optimizers' CPU kernels cannot be compiled: {compile_error()}. The plain loop is used instead. "
            "It is several times slower on a CPU. GPUs are not affected.",
            RuntimeWarning,
            stacklevel=2,
        )
    return not compile_error()


@functools.cache
def _library(dtype: torch.dtype) -> CDLL:
    return declared(compiled(REALS[dtype]))


def declared(library: CDLL) -> CDLL:
    """Declare the argument types of the functions of a library, and return the library."""
    for function, pointers in ((library.squares, 3), (library.lars, 5), (library.lamb, 8)):
        function.argtypes = [c_size_t, *[c_void_p] * pointers, c_int]
        function.restype = bool
    return library


def takes(param: Tensor, *others: Tensor) -> bool:
    """Whether a kernel can walk these side by side: CPU tensors of one dtype, shape and layout, without gaps."""
    dtype, shape = param.dtype, param.shape
    if dtype not in REALS:
        return False
    contiguous = True
    for tensor in (param, *others):
        # A subclass may keep its values elsewhere. A negated view stores the opposite of its values.
        if type(tensor) not in TENSOR_TYPES or not tensor.is_cpu or tensor.is_neg():
            return False
        if tensor.dtype != dtype or tensor.shape != shape:
            return False
        if not _has_memory(tensor):
            return False
        contiguous = contiguous and tensor.is_contiguous()
    return contiguous or (_is_dense(param) and all(_same_order(param, other) for other in others))


def takes_all(*lists: list[Tensor]) -> list[bool]:
    """Apply `takes` to the first tensors of all lists, to the second tensors, and so on.

    For thousands of small tensors this would take longer than the update. If `takes` has accepted them all, a guard
    recognizes their types, dtypes, shapes and strides in the next step. The kernels themselves test addresses.
    """
    tensors = list(chain(*lists))
    accepted = _accepted.setdefault(tensors[0], {})
    key = (len(lists), len(tensors))
    if key in accepted and accepted[key].check(*tensors):
        return [True] * len(lists[0])
    answers = [takes(*row) for row in zip(*lists, strict=True)]
    if all(answers) and _TensorGuards is not None:
        accepted[key] = _TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
            dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
        )
    return answers


def _has_memory(tensor: Tensor) -> bool:
    """Whether the elements have an aligned address; wrappers of torch.func and symbolic zeros have none."""
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        return False
    return address % tensor.itemsize == 0 and (address != 0 or tensor.numel() == 0)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _same_order(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have the same layout; the stride of a single element does not matter."""
    triples = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or a == b for size, a, b in triples)


def squares(tensors: list[Tensor]) -> list[float] | None:
    """The sum of squares of each tensor; None if one has no aligned memory."""
    sums = (c_double * len(tensors))()
    lists = (_sizes(tensors), _pointers(tensors))
    done = _library(tensors[0].dtype).squares(len(tensors), *lists, sums, torch.get_num_threads())
    return list(sums) if done else None


def lars(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], rule: SGDRule) -> bool:
    """`lars.optim.steps.sgd.sgd_loop` for tensors of one dtype and a rule of plain numbers.

    Returns False, and changes nothing, if a tensor has no aligned memory.
    """
    done: bool = _library(params[0].dtype).lars(
        len(params),
        _sizes(params),
        _pointers(params),
        _pointers(grads),
        _pointers(buffers) if buffers else None,
        byref(_struct(_Lars, rule)),
        torch.get_num_threads(),
    )
    if done:
        increment_version([*params, *buffers])
    return done


def lamb(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    scales: list[tuple[float, float]],
    rule: AdamRule,
) -> bool:
    """`lars.optim.steps.adam.adam_loop` for tensors of one dtype and a rule of plain numbers.

    ``scales`` holds m̂ / m and √v̂ / √v of each tensor. Returns False, and changes nothing, if a
    tensor has no aligned memory.
    """
    done: bool = _library(params[0].dtype).lamb(
        len(params),
        _sizes(params),
        *map(_pointers, (params, grads, exp_avgs, exp_avg_sqs)),
        _numbers([m_scale for m_scale, _ in scales]),
        _numbers([v_scale for _, v_scale in scales]),
        byref(_struct(_Lamb, rule)),
        torch.get_num_threads(),
    )
    if done:
        increment_version([*params, *exp_avgs, *exp_avg_sqs])
    return done


def _struct(kind: type[_Struct], rule: SGDRule | AdamRule) -> _Struct:
    """Fill the C structure with the attributes of the rule that have the names of its fields."""
    names = [name for name, *_ in kind._fields_ if name != "trust"]
    values = {name: _number(getattr(rule, name)) for name in names}
    return kind(trust=_trust(rule.ratio_options()), **values)


def _trust(ratio_options: dict[str, Any]) -> _Trust:
    options = RATIO_DEFAULTS | ratio_options
    formula = options.pop("zero_norm") == "formula"
    clip_to_lr = options.pop("clip_to_lr") or 0.0  # 0: not clipped
    numbers = {name: _number(value) for name, value in options.items()}
    return _Trust(formula=formula, clip_to_lr=clip_to_lr, **numbers)


def _number(value: Any) -> Any:
    """The value for C: None means no bound."""
    return math.inf if value is None else value


def _pointers(tensors: list[Tensor]) -> Array[c_void_p]:
    return (c_void_p * len(tensors)).from_buffer(array("Q", map(Tensor.data_ptr, tensors)))


def _sizes(tensors: list[Tensor]) -> Array[c_size_t]:
    return (c_size_t * len(tensors)).from_buffer(array("Q", map(Tensor.numel, tensors)))


def _numbers(values: list[float]) -> Array[c_double]:
    return (c_double * len(values)).from_buffer(array("d", values))
