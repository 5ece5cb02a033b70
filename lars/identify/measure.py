"""Measurements on a single tensor: the moves of an optimizer, and its trust ratio.

Every probe uses weights and gradients that are orthogonal to each other. A move of an SGD-like rule then has one
coefficient along the weight and one along each gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lars.identify.candidate import Built, Candidate
from lars.identify.trial import SLIGHT_DECAY, take_step

TINY = 1e-12
DECAY = 0.5
SETTINGS = ((1.0, 1.0), (1.0, 2.0), (2.0, 1.0))  # ‖w‖, ‖g‖
DENOMINATORS = {
    "split": "‖g‖ + weight_decay ‖w‖",
    "joint": "‖g + weight_decay w‖",
    "momentum": "‖g‖ + momentum ‖w‖",
    "gradient": "‖g‖",
}
WEIGHT, FIRST, SECOND, THIRD = range(4)  # rows of the tensor, which serve as directions


def direction(row: int) -> Tensor:
    """A unit vector: a (4, 4) tensor with one row of 0.5."""
    unit = torch.zeros(4, 4, dtype=torch.float64)
    unit[row] = 0.5
    return unit


@dataclass(frozen=True)
class Bench:
    """Takes single steps with fresh optimizers.

    Attributes:
        candidate: The class to measure.
        momentum: Its momentum.
    """

    candidate: Candidate
    momentum: float

    def moves(
        self,
        weight: Tensor,
        grads: Sequence[Tensor],
        rates: Sequence[float],
        decay: float,
        momentum: float = 0.0,
    ) -> list[Tensor]:
        """The moves of one tensor, one for each gradient and learning rate."""
        param = nn.Parameter(weight.clone())
        group = {"params": [param], "weight_decay": decay}
        optimizer: Built = self.candidate.create([group], lr=max(rates), momentum=momentum)
        moves = []
        for grad, lr in zip(grads, rates, strict=True):
            param.grad, before = grad.clone(), param.detach().clone()
            take_step(optimizer, lr)
            moves.append(before - param.detach())
        return moves

    def first_move(
        self,
        w_norm: float,
        g_norm: float,
        decay: float = DECAY,
        momentum: float = 0.0,
        lr: float = 1.0,
    ) -> tuple[float, float]:
        """The first move divided by lr: its length along g over ‖g‖, and along w over ‖w‖.

        The first is the trust ratio, the second is the ratio times weight decay in a coupled rule.
        """
        weight, grad = w_norm * direction(WEIGHT), g_norm * direction(FIRST)
        (move,) = self.moves(weight, [grad], [lr], decay, momentum)
        along_g = float((move * direction(FIRST)).sum()) / (lr * g_norm) if g_norm else 0.0
        along_w = float((move * direction(WEIGHT)).sum()) / (lr * w_norm) if w_norm else 0.0
        return along_g, along_w


def is_sgd_like(bench: Bench) -> bool:
    """Whether the first move lies in the plane of gradient and weight, for elements of different size."""
    weight, grad = 2 * direction(WEIGHT), direction(FIRST) + 0.25 * direction(SECOND)
    (move,) = bench.moves(weight, [grad], [1.0], SLIGHT_DECAY)
    one = float((move * direction(FIRST)).sum())
    two = float((move * direction(SECOND)).sum())
    return math.isclose(one, 4 * two, rel_tol=1e-6)


@dataclass(frozen=True)
class Ratio:
    """The trust ratio as measured on the first step.

    Attributes:
        kind: The denominator, a key of `DENOMINATORS`; "unknown"; None: there is no trust ratio.
        coefficient: The trust coefficient.
        eps: What is added to the denominator.
        clipped: Whether the ratio is min(ratio, lr) / lr.
        momentum: The momentum of the optimizer, for the denominator "momentum".
    """

    kind: str | None
    coefficient: float = 1.0
    eps: float = 0.0
    clipped: bool = False
    momentum: float = 0.0

    @classmethod
    def measured(cls, bench: Bench) -> Ratio:
        """Measure the ratio without momentum, and see whether momentum changes it."""
        values = [bench.first_move(*norms)[0] for norms in SETTINGS]
        if all(math.isclose(value, values[0], rel_tol=1e-9) for value in values):
            return cls(None, values[0])
        kind = denominator_of(values, 0.0)
        if kind == "gradient" and bench.momentum:
            with_momentum = [bench.first_move(*s, momentum=bench.momentum)[0] for s in SETTINGS]
            if denominator_of(with_momentum, bench.momentum) == "momentum":
                kind = "momentum"
        if kind is None:
            return cls("unknown", math.nan)
        coefficient = values[0] * denominator(kind, *SETTINGS[0], DECAY, 0.0)
        # Small norms make eps visible, and the ratio stays small.
        small = (1e-5, 1e-6)
        value = bench.first_move(*small, decay=TINY)[0]
        rest = denominator(kind, *small, TINY, 0.0)
        eps = coefficient * small[0] / value - rest if value else 0.0
        # The first estimate of the coefficient contains eps.
        coefficient *= 1 + eps / denominator(kind, *SETTINGS[0], DECAY, 0.0)
        eps = coefficient * small[0] / value - rest if value else 0.0
        # A clipped ratio times lr does not depend on lr.
        halves = [lr * bench.first_move(1.0, 1.0, lr=lr)[0] for lr in (1.0, 2.0)]
        clipped = math.isclose(*halves, rel_tol=1e-9)
        return cls(kind, coefficient, eps if abs(eps) > 1e-12 else 0.0, clipped, bench.momentum)

    def expected(self, w_norm: float, g_norm: float, decay: float) -> float:
        """The ratio of the formula, without bounds and without momentum."""
        if self.kind is None or self.kind == "unknown":
            return self.coefficient
        rest = denominator(self.kind, w_norm, g_norm, decay, 0.0)
        return self.coefficient * w_norm / (rest + self.eps)


def denominator(kind: str, w_norm: float, g_norm: float, decay: float, momentum: float) -> float:
    """The denominator for a gradient that is orthogonal to the weight."""
    return {
        "split": g_norm + decay * w_norm,
        "joint": math.hypot(g_norm, decay * w_norm),
        "momentum": g_norm + momentum * w_norm,
        "gradient": g_norm,
    }[kind]


def denominator_of(values: list[float], momentum: float) -> str | None:
    """The denominator that explains ratios at `SETTINGS`; None if none does."""
    kinds = [kind for kind in DENOMINATORS if momentum or kind != "momentum"]
    for kind in kinds:
        coefficients = [
            value * denominator(kind, *norms, DECAY, momentum) / norms[0]
            for value, norms in zip(values, SETTINGS, strict=True)
        ]
        if all(math.isclose(c, coefficients[0], rel_tol=1e-4) for c in coefficients):
            return kind
    return None
