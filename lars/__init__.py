"""Large-batch training: the LARS family of optimizers, their schedules, and a Horovod training engine.

Names are loaded when they are first used, so that ``import lars`` costs nothing and never needs more than torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lars.optim import (
        LARS,
        OPTIMIZERS,
        create_optimizer,
        create_optimizer_lars,
        parameter_groups,
    )
    from lars.schedules import PolynomialWarmup, polynomial

__all__ = [
    "LARS",
    "OPTIMIZERS",
    "PolynomialWarmup",
    "create_optimizer",
    "create_optimizer_lars",
    "parameter_groups",
    "polynomial",
]

_SCHEDULES = ("PolynomialWarmup", "polynomial")


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "lars.schedules" if name in _SCHEDULES else "lars.optim"
    return getattr(importlib.import_module(room), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
