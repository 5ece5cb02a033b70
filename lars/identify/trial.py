"""The trial: fixed weights, gradients and learning rates, and the moves of an optimizer on them.

The gradients do not depend on the weights, so two optimizers with the same rule make the same moves. All numbers are
float64 and come from a generator with a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

WEIGHT_DECAY = 0.01
SLIGHT_DECAY = 1e-9  # small enough for a large ratio, and still not 0
# The options of a group that exclude it from the trust ratio: NUS, mmpretrain, apex of ROCm, and this library.
FLAGS = {"lars": False, "lars_exclude": True, "is_skipped": True, "adapt": False}
# Weight decay of the groups, in the order in which an optimizer gets them.
DECAYS = {
    "decayed": WEIGHT_DECAY,
    "slightly decayed": SLIGHT_DECAY,
    "undecayed": 0.0,
    "flagged": WEIGHT_DECAY,
}
RATES = (0.0, 0.25, 0.5, 0.5, 0.5, 0.35, 0.2, 0.1, 0.02)
RATES_ABOVE_ZERO = (0.05, *RATES[1:])
PHASES = (
    "warm-up, lr 0",
    "warm-up",
    "first step after warm-up",
    "constant lr",
    "outlier gradient in `spike.weight`",
    "decay, zero gradient in `pause.weight`",
    "decay",
    "decay",
    "decay",
)
SPIKE_STEP, PAUSE_STEP = 4, 5  # from 0


@dataclass(frozen=True)
class Layer:
    """A tensor of the trial.

    Attributes:
        name: Its name in reports.
        shape: Its shape.
        group: Its group, a key of `DECAYS`.
        weight_norm: ‖w‖ at the start.
        grad_norm: ‖g‖ in each step; None: it has no gradient.
    """

    name: str
    shape: tuple[int, ...]
    group: str
    weight_norm: float
    grad_norm: float | None

    @property
    def kind(self) -> str:
        """What decides whether an optimizer excludes it: a key of `lars.identify.compare.TREATMENTS`."""
        if self.group == "flagged":
            return "flagged"
        if self.group == "undecayed":
            return "undecayed 1-D" if len(self.shape) == 1 else "undecayed"
        return "1-D" if len(self.shape) == 1 else "ordinary"


LAYERS = (
    Layer("conv.weight", (4, 3, 3, 3), "decayed", 3.0, 0.5),
    Layer("fc.weight", (5, 6), "decayed", 2.0, 2.0),
    Layer("large.weight", (6, 6), "decayed", 40.0, 1.0),
    # ‖g‖ is above 10, the bound of TVLARS, and the elements are below 10, the bound of NUS.
    Layer("large_gradient.weight", (6, 6), "decayed", 4.0, 11.0),
    Layer("spike.weight", (4, 4), "decayed", 2.0, 1.0),
    Layer("pause.weight", (4, 4), "decayed", 2.0, 1.0),
    Layer("zero.weight", (4, 4), "decayed", 0.0, 1.0),
    Layer("no_gradient.weight", (4, 4), "decayed", 2.0, 0.0),
    Layer("dead.weight", (4, 4), "decayed", 0.0, 0.0),
    Layer("unused.weight", (4, 4), "decayed", 2.0, None),
    Layer("bn.weight", (8,), "decayed", 3.0, 0.2),
    Layer("bn.bias", (8,), "decayed", 0.5, 0.2),
    Layer("tiny_gradient.weight", (4, 4), "slightly decayed", 3.0, 1e-5),
    Layer("head.weight", (4, 5), "undecayed", 2.0, 0.5),
    Layer("ln.weight", (8,), "undecayed", 3.0, 0.2),
    Layer("excluded.weight", (4, 4), "flagged", 2.0, 0.5),
)


class Stepper(Protocol):
    """What a trial needs of an optimizer."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups, whose lr the trial sets."""

    def step(self) -> Any:
        """Update the weights."""


Moves = list[
    dict[str, Tensor]
]  # per step and tensor: the weight before the step minus the weight after it
Build = Callable[[list[dict[str, Any]]], Stepper]


def random_tensor(shape: Sequence[int], norm: float, generator: torch.Generator) -> Tensor:
    """A tensor of this L2 norm in float64, with elements of similar size."""
    values = torch.rand(*shape, dtype=torch.float64, generator=generator) * 2 - 1
    return values * (norm / values.norm())


def weights_and_gradients() -> tuple[dict[str, Tensor], list[dict[str, Tensor | None]]]:
    """The weights at the start, and the gradients of each step, by the name of the tensor."""
    generator = torch.Generator().manual_seed(0)
    weights = {x.name: random_tensor(x.shape, x.weight_norm, generator) for x in LAYERS}
    gradients: list[dict[str, Tensor | None]] = []
    for step in range(len(RATES)):
        scales = {"spike.weight": 100.0} if step == SPIKE_STEP else {}
        scales |= {"pause.weight": 0.0} if step == PAUSE_STEP else {}
        gradients.append({})
        for layer in LAYERS:
            norm = layer.grad_norm
            # Norms differ between steps, so that the ratio of one step differs from that of the next.
            varied = None if norm is None else norm * scales.get(layer.name, 1.0) * (1 + step % 3)
            gradients[-1][layer.name] = (
                None if varied is None else random_tensor(layer.shape, varied, generator)
            )
    return weights, gradients


def groups_of(params: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The parameter groups of the trial, with their weight decay. The last group has every known exclusion flag."""
    groups: list[dict[str, Any]] = []
    for group, decay in DECAYS.items():
        members = [params[layer.name] for layer in LAYERS if layer.group == group]
        flags = FLAGS if group == "flagged" else {}
        groups.append({"params": members, "weight_decay": decay, **flags})
    return groups


def moves_of(build: Build, rates: Sequence[float] = RATES) -> Moves:
    """The moves of an optimizer.

    Args:
        build: Creates the optimizer from parameter groups.
        rates: The learning rate of each step.

    Raises:
        Exception: Whatever the optimizer raises.
    """
    weights, gradients = weights_and_gradients()
    params = {name: nn.Parameter(weight) for name, weight in weights.items()}
    optimizer = build(groups_of(params))
    moves = []
    for lr, grads in zip(rates, gradients, strict=True):
        for name, param in params.items():
            grad = grads[name]
            param.grad = None if grad is None else grad.clone()
        before = {name: param.detach().clone() for name, param in params.items()}
        take_step(optimizer, lr)
        moves.append({name: before[name] - param.detach() for name, param in params.items()})
    return moves


def take_step(optimizer: Stepper, lr: float) -> None:
    """Take one step with this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def phase(step: int, rates: Sequence[float]) -> str:
    """The words for a step, which counts from 0: its number from 1, and what happens in it."""
    words = PHASES[step] if rates[step] or not step else "warm-up"
    words = "warm-up" if step == 0 and rates[0] else words
    return f"step {step + 1} ({words})"


def rounded(value: float) -> float:
    """A measured value without its rounding errors."""
    return float(f"{value:.6g}") if math.isfinite(value) else value
