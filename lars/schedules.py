"""Learning rates as functions of the step, and the same as torch schedulers.

Every schedule is a pure function: ``step`` first, counted in optimizer steps from 0, the rest by keyword. ``peak`` is the
rate after the warm-up. Nothing is to be remembered or saved: a resumed run calls the function with another step.

The classes are thin `torch.optim.lr_scheduler.LRScheduler`s over these functions, for code that expects torch's idiom. Their
state is plain numbers (it loads with ``weights_only=True``).
"""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def polynomial(
    step: int,
    *,
    peak: float,
    total_steps: float,
    warmup_steps: float = 0,
    end_lr: float = 0.0,
    power: float = 2.0,
) -> float:
    """Linear warm-up from 0, then polynomial decay: the LARS papers' schedule.

    With W = warmup_steps and D = total_steps:

        step < W:    peak * step / W
        step >= W:   (peak - end_lr) * (1 - min(step - ceil(W), D - W) / (D - W)) ** power + end_lr

    so step 0 has rate 0 if there is a warm-up, step ceil(W) has exactly ``peak``, and end_lr is reached D - W steps later.

    Args:
        step: Optimizer step, from 0.
        peak: Rate at the end of the warm-up.
        total_steps: Steps of the whole run, warm-up included.
        warmup_steps: Steps of the warm-up; fractions count.
        end_lr: Rate at the end.
        power: Exponent of the decay; 1 is linear.

    Returns:
        The learning rate for this step.

    Reference:
        You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks" (arXiv 1708.03888), section 5;
        the counting is that of NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch, whose results table was made with it.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    decay_steps = total_steps - warmup_steps
    done = min(step - math.ceil(warmup_steps), decay_steps)
    left = 1 - done / decay_steps if decay_steps > 0 else 0.0
    return (peak - end_lr) * left**power + end_lr


class _ScheduleLR(LRScheduler):
    """An LRScheduler whose rate is a function of (base rate, step). Subclasses keep their numbers as attributes."""

    def rate(self, base_lr: float, step: int) -> float:
        """The learning rate of a group with this base rate."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Any]:
        """The rate of every group at the current step."""
        return [self.rate(base_lr, self.last_epoch) for base_lr in self.base_lrs]


class PolynomialWarmup(_ScheduleLR):
    """`polynomial`, stepped once per optimizer step."""

    def __init__(
        self,
        optimizer: Optimizer,
        decay_steps: float,
        warmup_steps: float = 0,
        end_lr: float = 1e-4,
        power: float = 1.0,
        last_epoch: int = -1,
    ) -> None:
        self.decay_steps = decay_steps
        self.warmup_steps = warmup_steps
        self.end_lr = end_lr
        self.power = power
        super().__init__(optimizer, last_epoch)

    def rate(self, base_lr: float, step: int) -> float:
        return polynomial(
            step,
            peak=base_lr,
            total_steps=self.decay_steps,
            warmup_steps=self.warmup_steps,
            end_lr=self.end_lr,
            power=self.power,
        )
