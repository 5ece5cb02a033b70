"""Large-batch training: the LARS family of optimizers, their learning-rate schedules, and a Horovod trainer.

``import lars`` is fast because each name is loaded when it is first used. The library needs torch and nothing else.
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

__version__ = "0.1.0"  # setup.py reads it from here

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

_MODULES = ("optim", "schedules")
_FROM_SCHEDULES = ("SCHEDULES", "FunctionLR", "GradualWarmup", "PolynomialWarmup", "scale_lr")


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"lars.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "lars.schedules" if name in _FROM_SCHEDULES else "lars.optim"
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
