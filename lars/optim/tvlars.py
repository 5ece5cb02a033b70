"""TVLARS: LARS whose trust coefficient starts high and falls, in place of a warm-up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lars.optim.groups import (
    check_bound,
    check_choice,
    check_not_negative,
    check_number,
    options_of,
)
from lars.optim.lars import CHOICES, LayerwiseSGD
from lars.optim.update import Rule


def time_factor(
    step: Tensor, *, lmbda: float, alpha: float = 0.1, delay: float = 0.0, floor: float = 0.0
) -> Tensor:
    """1 / (alpha + exp(lmbda * (step - delay))) + floor, a falling sigmoid of the step.

    An exponential that overflows is inf, and the factor is ``floor``.
    """
    return 1 / (alpha + torch.exp(lmbda * (step - delay))) + floor


class TVLARS(LayerwiseSGD):
    r"""Time-varying LARS.

    For each tensor w with gradient g, momentum buffer b (zeros before the first step) and the step
    number t from 1:

        d      = g + weight_decay * w
        factor = 1 / (alpha + exp(lmbda * (t - delay))) + floor
        ratio  = trust_coefficient * factor * min(‖w‖, max_norm) / min(‖d‖, max_norm)
        b      = momentum * b + ratio * d
        w      = w - lr * b

    The ratio is 1 where ‖w‖ or ‖d‖ is 0. The defaults are those of the KhoiDOO/tvlars code, which
    has neither ``delay`` nor ``floor``. The paper has both and no max_norm: its factor stays near
    its height until step ``delay`` and then falls to ``floor``.

    Deliberate differences from that code: t is kept in the parameter group, so it is saved,
    loaded, and survives Horovod's wrapper; the factor is computed in float64; no norm is logged in
    memory. A group that is added later counts from its own first step.

    Args:
        params: Parameters or parameter groups; see `parameter_groups` for the usual two.
        lr: Learning rate, a float or a 0-dim tensor.
        momentum: Momentum factor.
        weight_decay: Weight decay.
        trust_coefficient: η of the papers.
        lmbda: How fast the factor falls, per step (λ of the paper).
        alpha: Sets the factor's height, 1 / alpha (α of the paper); more than 0.
        delay: The step around which the factor falls (d_e of the paper).
        floor: What is left of the factor in the end (γ_min of the paper).
        max_norm: Bound of ‖w‖ and ‖d‖ in the ratio; None: no bound.
        adapt: Whether there is a trust ratio; usually set per group.
        nonfinite: As in `LARS`.
        path: As in `LARS`.

    Raises:
        ValueError: A name is not known, or a value is out of range.
        TypeError: A value is no number.

    References:
        Do et al., "Revisiting LARS for Large Batch Training Generalization of Neural Networks",
        arXiv 2309.14053.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        trust_coefficient: float = 1e-3,
        *,
        lmbda: float = 1e-3,
        alpha: float = 0.1,
        delay: float = 0.0,
        floor: float = 0.0,
        max_norm: float | None = 10.0,
        adapt: bool = True,
        nonfinite: str = "propagate",
        path: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "lmbda": lmbda,
            "alpha": alpha,
            "delay": delay,
            "floor": floor,
            "max_norm": max_norm,
            "inside": "ratio",
            "denominator": "joint",
            "adapt": adapt,
            "nonfinite": nonfinite,
            "path": path,
        }
        super().__init__(*options_of(params, defaults))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose step count begins at 0 unless it brings its own as ``step``."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_not_negative(group, "lr", "momentum", "weight_decay", "trust_coefficient")
        check_not_negative(group, "lmbda", "floor")
        check_number("alpha", group["alpha"])
        if not 0 < group["alpha"] < math.inf:  # at 0 the factor has no height, and may overflow
            raise ValueError(f"alpha={group['alpha']} must be finite and more than 0")
        check_bound(group, "max_norm")
        check_choice("nonfinite", group["nonfinite"], CHOICES["nonfinite"])
        check_choice("path", group["path"], CHOICES["path"])
        check_number("delay", group["delay"])
        if not math.isfinite(group["delay"]):
            raise ValueError(f"delay={group['delay']} must be a finite number of steps")
        # A tensor, so that a compiled or captured step counts on; float64, so that it stays exact.
        zero = torch.zeros((), dtype=torch.float64, device=group["params"][0].device)
        group.setdefault("step", zero)

    def _rule(self, group: dict[str, Any]) -> Rule:
        device = group["params"][0].device
        if group["step"].device != device:  # loaded from a checkpoint mapped to the CPU
            group["step"] = group["step"].to(device)
        step = group["step"]
        step += 1
        factor = time_factor(
            step,
            lmbda=group["lmbda"],
            alpha=group["alpha"],
            delay=group["delay"],
            floor=group["floor"],
        )
        options = {name: group[name] for name in Rule.__slots__ if name in group}
        return Rule(**options | {"trust_coefficient": group["trust_coefficient"] * factor})
