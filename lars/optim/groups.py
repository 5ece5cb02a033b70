"""Parameter groups: which parameters get weight decay and a trust ratio."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

# _NormBase is the base class of BatchNorm, InstanceNorm and SyncBatchNorm, including that of Horovod.
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# The class of a norm layer that somebody wrote: RMSNorm, LlamaRMSNorm, LayerNorm2d, BatchNormAct2d.
NORM_CLASS = re.compile(r"norm(act)?([123]d)?$", re.IGNORECASE)
KINDS = ("norm", "bias", "1d", "no_weight_decay")


def parameter_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    *,
    exclude: str | Collection[str] = ("norm", "bias"),
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model into an adapted and an excluded group.

    ``exclude`` says which parameters are excluded:

    - "norm": the parameters of all norm layers, and the one-dimensional parameters of layers whose
      class is named like one, such as ``LlamaRMSNorm``.
    - "bias": parameters whose own name is ``bias``, begins with ``bias_`` (`torch.nn.LSTM`) or ends
      in ``_bias`` (`torch.nn.MultiheadAttention`). The name of the layer does not matter:
      ``rebias.weight`` is a weight.
    - "1d": parameters with at most one dimension, such as LayerScale.
    - "no_weight_decay": the parameters that ``model.no_weight_decay()`` names, if the model or a
      part of it has this method. Names can contain ``*``. Vision transformers of timm name their
      position embedding and their class token.

    All four together are the rule of timm. The default is the rule of the published LARS runs,
    under which checkpoints keep their groups. On a ResNet both give the same groups.

    Args:
        model: The model; its parameters keep their order. Frozen parameters are in no group.
        weight_decay: The weight decay of the adapted group.
        exclude: One of these words, several, or nothing.

    Returns:
        Groups for any torch optimizer: the adapted group, then the excluded group with
        ``weight_decay`` 0 and ``adapt`` False. The optimizers of this library read ``adapt=False``
        as "no trust ratio", and those of torch ignore it. A group without parameters is left out.

    Raises:
        ValueError: No parameter is trainable, or ``exclude`` holds an unknown word.
    """
    kinds = words(exclude, "exclude", KINDS)
    left_out = _named_by_the_model(model) if "no_weight_decay" in kinds else set()
    if "norm" in kinds:
        left_out |= _in_norms(model)
    adapted: list[nn.Parameter] = []
    excluded: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            is_bias = "bias" in kinds and _is_bias(name)
            is_1d = "1d" in kinds and param.ndim <= 1
            (excluded if id(param) in left_out or is_bias or is_1d else adapted).append(param)
    groups: list[dict[str, Any]] = [
        {"params": adapted, "weight_decay": weight_decay},
        {"params": excluded, "weight_decay": 0.0, "adapt": False},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("the model has no trainable parameter: all have requires_grad=False")
    return groups


def scale_rate(optimizer: Optimizer, params: Iterable[nn.Parameter], factor: float) -> None:
    """Give parameters of an optimizer that has taken no step a learning rate of their own.

    They move to groups with the same options and ``lr_scale``, by which the trainer multiplies the learning rate
    before every step. If their group has ``lr_scale`` already, the factors are multiplied.

    Args:
        optimizer: Any torch optimizer.
        params: Some of its parameters. Others, such as frozen ones, are ignored.
        factor: Their learning rate divided by that of the other parameters.
    """
    chosen = {id(param) for param in params}
    for group in list(optimizer.param_groups):
        moved = [param for param in group["params"] if id(param) in chosen]
        group["params"] = [param for param in group["params"] if id(param) not in chosen]
        if moved:
            # Each group has its own tensors, such as the step count of TVLARS, which steps change in place.
            own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items()}
            scale = factor * group.get("lr_scale", 1.0)
            optimizer.param_groups.append(own | {"params": moved, "lr_scale": scale})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def words(given: str | Collection[str], option: str, known: Collection[str]) -> tuple[str, ...]:
    """One word or several as a tuple.

    Raises:
        ValueError: A word is unknown.
    """
    chosen = (given,) if isinstance(given, str) else tuple(given)
    unknown = sorted({word for word in chosen if word not in known})
    if unknown:
        raise ValueError(f"{option}={unknown} is not known; choose from: {', '.join(known)}")
    return chosen


def _in_norms(model: nn.Module) -> set[int]:
    """The identities of the parameters of norm layers."""
    found = set()
    for module in model.modules():
        known = isinstance(module, NORMS)
        if known or NORM_CLASS.search(type(module).__name__):
            own = module.parameters(recurse=False)
            found |= {id(param) for param in own if known or param.ndim <= 1}
    return found


def _named_by_the_model(model: nn.Module) -> set[int]:
    """The identities of the parameters that ``no_weight_decay()`` of a module names."""
    found = set()
    for module in model.modules():
        method = getattr(module, "no_weight_decay", None)
        if callable(method):
            patterns = tuple(method())
            for name, param in module.named_parameters():
                if any(fnmatchcase(name, pattern) for pattern in patterns):
                    found.add(id(param))
    return found


def _is_bias(name: str) -> bool:
    own_name = name.rpartition(".")[2]
    return own_name == "bias" or own_name.startswith("bias_") or own_name.endswith("_bias")


def excluded_kinds(bn_bias_separately: bool) -> tuple[str, ...]:
    """Translate ``bn_bias_separately`` into the ``exclude`` of `parameter_groups`."""
    return ("norm", "bias") if bn_bias_separately else ()
