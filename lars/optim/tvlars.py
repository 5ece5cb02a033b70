"""TVLARS: LARS with a trust coefficient that starts high and falls, instead of a warm-up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lars.optim.base import rule_of
from lars.optim.lars import LayerwiseSGD
from lars.optim.options import (
    CHOICES,
    check_bound,
    check_choices,
    check_not_negative,
    check_number,
    defaults_from,
    params_and_defaults,
)
from lars.optim.steps.sgd import SGDRule
from lars.optim.steps.tensors import Tensors


def time_factor(
    step: Tensor, *, lmbda: float, alpha: float = 0.1, delay: float = 0.0, floor: float = 0.0
) -> Tensor:
    """1 / (alpha + exp(lmbda * (step - delay))) + floor, a falling sigmoid of the step.

    If the exponential overflows to inf, the factor is ``floor``.
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
    has neither ``delay`` nor ``floor``. The paper has both, and no max_norm: its factor stays close
    to its maximum until step ``delay``, and then falls to ``floor``.

    Deliberate differences from that code: t is kept in the parameter group, so it is saved and
    loaded, and it survives Horovod's wrapper. The factor is computed in float64. No norms are
    logged in memory. A group that is added later counts from its own first step.

    Args:
        params: Parameters or parameter groups; `parameter_groups` builds the usual two groups.
        lr: Learning rate, a float or a 0-dim tensor.
        momentum: Momentum factor.
        weight_decay: Weight decay.
        trust_coefficient: η of the papers.
        lmbda: How fast the factor falls, per step (λ of the paper).
        alpha: Sets the maximum of the factor, 1 / alpha (α of the paper); more than 0.
        delay: The step around which the factor falls (d_e of the paper).
        floor: The final value of the factor (γ_min of the paper).
        max_norm: Bound of ‖w‖ and ‖d‖ in the ratio; None: no bound.
        adapt: Whether to use a trust ratio; usually set per group.
        nonfinite: As in `LARS`.
        path: As in `LARS`.

    Raises:
        ValueError: A name is unknown, or a value is out of range.
        TypeError: A value is not a number.

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
        defaults = defaults_from(locals())
        super().__init__(*params_and_defaults(params, defaults))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Its step count begins at 0 unless the group has its own as ``step``."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["step"] = step_count(group.get("step", 0), group["params"])

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        check_not_negative(group, "lr", "momentum", "weight_decay", "trust_coefficient")
        check_not_negative(group, "lmbda", "floor")
        check_bound(group, "max_norm")
        check_choices(group, CHOICES)
        check_number("alpha", group["alpha"])
        if not 0 < group["alpha"] < math.inf:  # at 0 the factor has no maximum, and can overflow
            raise ValueError(f"alpha={group['alpha']} must be finite and more than 0")
        check_number("delay", group["delay"])
        if not math.isfinite(group["delay"]):
            raise ValueError(f"delay={group['delay']} must be a finite number of steps")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of TVLARS, LARS or SGD, of this library or another.

        Options that its groups lack keep their values, including the step count, which the code of
        KhoiDOO/tvlars does not save.

        Raises:
            ValueError: As in `LayerwiseOptimizer.load_state_dict`.
        """
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["step"] = step_count(group["step"], group["params"])

    def _step_group(self, group: dict[str, Any], params: Tensors, grads: Tensors) -> None:
        step = group["step"]
        step += 1 if self.found_inf is None else 1 - self.found_inf.to(step.device)
        super()._step_group(group, params, grads)

    def _rule(self, group: dict[str, Any]) -> SGDRule:
        shape = {name: group[name] for name in ("lmbda", "alpha", "delay", "floor")}
        coefficient = group["trust_coefficient"] * time_factor(group["step"], **shape)
        fixed = {"inside": "ratio", "denominator": "joint", "found_inf": self.found_inf}
        return rule_of(SGDRule, group, trust_coefficient=coefficient, **fixed)


def step_count(step: Any, params: list[Tensor]) -> Tensor:
    """A step count on the device of the parameters, in float64, in which it stays exact.

    It is a tensor, so that a compiled or captured step can count.
    """
    device = params[0].device if params else None
    return torch.as_tensor(step, dtype=torch.float64, device=device).reshape(())
