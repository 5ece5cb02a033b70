"""Parameter groups: which parameters get weight decay and a trust ratio."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

# _NormBase is the base class of BatchNorm, InstanceNorm and SyncBatchNorm, including that of Horovod.
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, *, exclude: Collection[str] = ("norm", "bias")
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model into an adapted and an excluded group.

    "norm" excludes the parameters of all norm layers. "bias" excludes parameters whose own name is
    ``bias``, begins with ``bias_`` (`torch.nn.LSTM`) or ends in ``_bias``
    (`torch.nn.MultiheadAttention`). The name of the layer does not matter: ``rebias.weight`` is a
    weight. All other parameters are adapted, including one-dimensional ones. Frozen parameters are
    in no group.

    Args:
        model: The model; its parameters keep their order.
        weight_decay: The weight decay of the adapted group.
        exclude: What to exclude: "norm", "bias", both, or nothing.

    Returns:
        Groups for any torch optimizer: the adapted group, then the excluded group with
        ``weight_decay`` 0 and ``adapt`` False. The optimizers of this library read ``adapt=False``
        as "no trust ratio", and those of torch ignore it. A group without parameters is left out.

    Raises:
        ValueError: No parameter is trainable, or ``exclude`` holds an unknown word.
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
    """Translate ``bn_bias_separately`` into the ``exclude`` of `parameter_groups`."""
    return ("norm", "bias") if bn_bias_separately else ()
