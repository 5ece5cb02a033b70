"""Learning-rate schedules, as functions of the step and as torch schedulers."""

from __future__ import annotations

from lars.schedules.functions import (
    SCHEDULES,
    constant_warmup,
    cosine,
    epochwise_polynomial,
    polynomial,
    ramp,
    scale_lr,
    step_decay,
    warmup,
)
from lars.schedules.torch_schedulers import FunctionLR, GradualWarmup, PolynomialWarmup

__all__ = [
    "SCHEDULES",
    "FunctionLR",
    "GradualWarmup",
    "PolynomialWarmup",
    "constant_warmup",
    "cosine",
    "epochwise_polynomial",
    "polynomial",
    "ramp",
    "scale_lr",
    "step_decay",
    "warmup",
]
