"""The large-batch optimizers: LARS, LAMB, TVLARS, and LARS around any torch optimizer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from lars import names
from lars.optim.base import class_named
from lars.optim.groups import excluded_kinds, parameter_groups
from lars.optim.lamb import LAMB, create_lamb_optimizer
from lars.optim.lars import LARS, create_optimizer_lars, usual_eps
from lars.optim.options import check_choice
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

OPTIMIZERS: tuple[str, ...] = tuple(names.OPTIMIZERS)


def create_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    eps: float | None = None,
    bn_bias_separately: bool = True,
    exclude: str | Collection[str] | None = None,
    **options: Any,
) -> Optimizer:
    """Create an optimizer by name.

    Args:
        name: One of `OPTIMIZERS`.
        model: The model whose trainable parameters are optimized.
        lr: Learning rate.
        momentum: Momentum of sgd, lars and tvlars; the other optimizers ignore it.
        weight_decay: Weight decay of the adapted parameters.
        eps: The ``eps`` of the optimizer. None: its own default, and 1e-5 for lars with the form
            ``nus``, as in `create_optimizer_lars`. sgd and tvlars ignore it.
        bn_bias_separately: Whether norms and biases get neither weight decay nor a trust ratio.
        exclude: Which parameters get neither; see `parameter_groups`. None: `bn_bias_separately` decides.
        **options: Further arguments of the optimizer's class, e.g. ``form="mlperf"`` for lars.

    Raises:
        ValueError: The name is unknown, or a value is out of range.
        TypeError: The optimizer does not have one of the options.
    """
    check_choice("optimizer", name, OPTIMIZERS)
    row = names.OPTIMIZERS[name]
    if name == "lars" and eps is None:
        eps = usual_eps(options.get("form", "nus"))
    common = {"momentum": momentum, "eps": eps}
    options |= {key: common[key] for key in row.takes if common[key] is not None}
    if exclude is None:
        exclude = excluded_kinds(bn_bias_separately)
    groups = parameter_groups(model, weight_decay, exclude=exclude)
    return cast(
        Optimizer, class_named(row.path)(groups, lr=lr, weight_decay=weight_decay, **options)
    )
