"""Parameter groups: which parameters get decay and trust ratio, and what a group may hold."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

# _NormBase is the base of BatchNorm, InstanceNorm and SyncBatchNorm, Horovod's own included.
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, *, exclude: Collection[str] = ("norm", "bias")
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into those that are adapted and those that are not.

    "norm" stands for all parameters of norm layers of every kind. "bias" stands for parameters
    whose own name is ``bias``, begins with ``bias_`` (`torch.nn.LSTM`) or ends in ``_bias``
    (`torch.nn.MultiheadAttention`); the name of the *layer* says nothing, so ``rebias.weight`` is
    a weight. A bare parameter that is not called a bias is adapted, whatever its shape. Frozen
    parameters are in no group.

    Args:
        model: The model; its parameters keep their order.
        weight_decay: The weight decay of the adapted group.
        exclude: What is not adapted: "norm", "bias", both, or nothing.

    Returns:
        Groups for any torch optimizer: the adapted one, then the excluded one with
        ``weight_decay`` 0 and ``adapt`` False, which this library's optimizers read as "no trust
        ratio" and torch's own ignore. A group without parameters is left out.

    Raises:
        ValueError: No parameter is trainable, or ``exclude`` holds another word.
    """
    unknown = set(exclude) - {"norm", "bias"}
    if unknown:
        raise ValueError(f"exclude={sorted(unknown)} is not known; choose from: norm, bias")
    in_norms = {
        id(param)
        for module in model.modules()
        if isinstance(module, NORMS)
        for param in module.parameters(recurse=False)
    }
    adapted: list[nn.Parameter] = []
    excluded: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            is_norm = "norm" in exclude and id(param) in in_norms
            is_bias = "bias" in exclude and _is_bias(name)
            (excluded if is_norm or is_bias else adapted).append(param)
    groups: list[dict[str, Any]] = [
        {"params": adapted, "weight_decay": weight_decay},
        {"params": excluded, "weight_decay": 0.0, "adapt": False},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("the model has no trainable parameter: all have requires_grad=False")
    return groups


def _is_bias(name: str) -> bool:
    own_name = name.rpartition(".")[2]
    return own_name == "bias" or own_name.startswith("bias_") or own_name.endswith("_bias")


def excluded_kinds(bn_bias_separately: bool) -> tuple[str, ...]:
    """What ``bn_bias_separately`` means for `parameter_groups`."""
    return ("norm", "bias") if bn_bias_separately else ()


def with_grads(group: dict[str, Any], optimizer: str) -> list[Tensor]:
    """The parameters of a group that have a gradient.

    Raises:
        RuntimeError: A gradient is sparse; a trust ratio needs the whole layer.
    """
    params = [p for p in group["params"] if p.grad is not None]
    if any(p.grad.layout != torch.strided for p in params):
        raise RuntimeError(
            f"{optimizer} does not take sparse gradients: build the embedding with sparse=False, "
            "or give its weight to torch.optim.SparseAdam"
        )
    return params


def form_options(
    form: str, forms: Mapping[str, dict[str, Any]], plain: dict[str, Any]
) -> dict[str, Any]:
    """Every option of a named form."""
    check_choice("form", form, forms)
    return plain | forms[form]


def options_of(params: Any, defaults: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The parameters, and the defaults for groups that are added later.

    Groups that name every option were another optimizer's, which Horovod's wrapper builds anew from them; its defaults
    were those of its first group.
    """
    if isinstance(params, Tensor):
        return params, defaults
    params = list(params)
    first = params[0] if params and isinstance(params[0], dict) else {}
    if defaults.keys() <= first.keys():
        defaults = {name: first[name] for name in defaults}
    return params, defaults


def keep_options(groups: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    """Give loaded groups the options that they lack: plain SGD's know none of a trust ratio."""
    for group, own in zip(groups, before, strict=True):
        for name, value in own.items():
            group.setdefault(name, value)


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of: {', '.join(choices)}")


def check_not_negative(group: dict[str, Any], *names: str) -> None:
    """Raise unless the group's named values are finite numbers of 0 or more."""
    for name in names:
        check_number(name, group[name])
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"{name}={group[name]} must be finite and 0 or more")


def check_bound(group: dict[str, Any], *names: str) -> None:
    """Raise unless the group's named bounds are positive or None."""
    for name in names:
        bound = group[name]
        if bound is not None:
            check_number(name, bound)
            if not bound > 0:
                raise ValueError(f"{name}={bound} must be more than 0, or None for no bound")


def check_number(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a real number or a tensor without dimensions."""
    if isinstance(value, Tensor) and value.ndim:
        raise TypeError(
            f"{name} must be a number or a 0-dim tensor, not of shape {tuple(value.shape)}"
        )
    if not isinstance(value, Real | Tensor):
        raise TypeError(f"{name}={value!r} must be a number")
