"""The large-batch optimizers: LARS and LAMB in their published forms, TVLARS, and LARS around any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lars.optim.groups import parameter_groups
from lars.optim.lars import LARS, create_optimizer_lars

__all__ = [
    "LARS",
    "OPTIMIZERS",
    "create_optimizer",
    "create_optimizer_lars",
    "parameter_groups",
]

_WITH_MOMENTUM: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "lars": LARS,
}
_WITHOUT_MOMENTUM: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
OPTIMIZERS: tuple[str, ...] = (*_WITH_MOMENTUM, *_WITHOUT_MOMENTUM)


def create_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    eps: float | None = None,
    bn_bias_separately: bool = True,
    **options: Any,
) -> torch.optim.Optimizer:
    """Build an optimizer by name.

    Args:
        name: One of `OPTIMIZERS`.
        model: The model whose trainable parameters are optimized.
        lr: Learning rate.
        momentum: Momentum of sgd, lars and tvlars; the others have none and ignore it (they take ``betas`` or ``alpha``).
        weight_decay: Weight decay of the adapted parameters.
        eps: The rule's ``eps``; None: the rule's own default. SGD has none and ignores it.
        bn_bias_separately: Whether biases and norms are left out of weight decay and trust ratio, see `parameter_groups`.
        **options: Further arguments of the optimizer's class, e.g. ``form="mlperf"`` for lars.

    Raises:
        ValueError: The name is not known, or an option is out of its range.
        TypeError: An option is not one of this optimizer's.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} is not known; choose one of: {', '.join(OPTIMIZERS)}")
    groups = parameter_groups(model, weight_decay, bn_bias_separately=bn_bias_separately)
    if eps is not None and name != "sgd":
        options["eps"] = eps
    if name in _WITH_MOMENTUM:
        return _WITH_MOMENTUM[name](
            groups, lr=lr, momentum=momentum, weight_decay=weight_decay, **options
        )
    return _WITHOUT_MOMENTUM[name](groups, lr=lr, weight_decay=weight_decay, **options)
