"""Large-batch training: the LARS family of optimizers, their schedules, and a Horovod engine.

Names are loaded when they are first used: ``import lars`` costs nothing, and none of them needs
more than torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lars.optim import (
        LAMB,
        LARS,
        OPTIMIZERS,
        TVLARS,
        LARSWrapper,
        create_lamb_optimizer,
        create_optimizer,
        create_optimizer_lars,
        parameter_groups,
    )
    from lars.schedules import SCHEDULES, FunctionLR, GradualWarmup, PolynomialWarmup, scale_lr

__all__ = [
    "LAMB",
    "LARS",
    "OPTIMIZERS",
    "SCHEDULES",
    "TVLARS",
    "FunctionLR",
    "GradualWarmup",
    "LARSWrapper",
    "PolynomialWarmup",
    "create_lamb_optimizer",
    "create_optimizer",
    "create_optimizer_lars",
    "parameter_groups",
    "scale_lr",
]

_ROOMS = ("optim", "schedules")
_OF_SCHEDULES = ("SCHEDULES", "FunctionLR", "GradualWarmup", "PolynomialWarmup", "scale_lr")


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return importlib.import_module(f"lars.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "lars.schedules" if name in _OF_SCHEDULES else "lars.optim"
    return getattr(importlib.import_module(room), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
