"""The large-batch optimizers: LARS, LAMB, TVLARS, and LARS around any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from lars.optim.groups import check_choice, excluded_kinds, parameter_groups
from lars.optim.lamb import LAMB, create_lamb_optimizer
from lars.optim.lars import LARS, create_optimizer_lars
from lars.optim.tvlars import TVLARS
from lars.optim.wrapper import LARSWrapper

__all__ = [
    "LAMB",
    "LARS",
    "OPTIMIZERS",
    "TVLARS",
    "LARSWrapper",
    "create_lamb_optimizer",
    "create_optimizer",
    "create_optimizer_lars",
    "parameter_groups",
]

_CLASSES: dict[str, Callable[..., Optimizer]] = {
    "sgd": SGD,
    "lars": LARS,
    "lamb": LAMB,
    "tvlars": TVLARS,
    "adam": Adam,
    "adamw": AdamW,
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
}
_WITH_MOMENTUM = ("sgd", "lars", "tvlars")
_WITHOUT_EPS = ("sgd", "tvlars")

OPTIMIZERS: tuple[str, ...] = tuple(_CLASSES)


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
) -> Optimizer:
    """Build an optimizer by name.

    Args:
        name: One of `OPTIMIZERS`.
        model: The model whose trainable parameters are optimized.
        lr: Learning rate.
        momentum: Momentum of sgd, lars and tvlars; the others do not use it.
        weight_decay: Weight decay of the adapted parameters.
        eps: The rule's ``eps``; None: the rule's own default. sgd and tvlars do not use it.
        bn_bias_separately: Whether norms and biases get neither weight decay nor trust ratio.
        **options: Further arguments of the optimizer's class, e.g. ``form="mlperf"`` for lars.

    Raises:
        ValueError: The name is not known, or a value is out of range.
        TypeError: An option is not one of this optimizer's.
    """
    check_choice("optimizer", name, OPTIMIZERS)
    groups = parameter_groups(model, weight_decay, exclude=excluded_kinds(bn_bias_separately))
    if name in _WITH_MOMENTUM:
        options["momentum"] = momentum
    if eps is not None and name not in _WITHOUT_EPS:
        options["eps"] = eps
    return _CLASSES[name](groups, lr=lr, weight_decay=weight_decay, **options)
