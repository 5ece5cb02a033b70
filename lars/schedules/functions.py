"""Learning-rate schedules as functions of the step.

Every schedule is a pure function. ``step`` comes first and counts optimizer steps from 0; the other
arguments are keywords, and ``peak`` is the rate at the end of the warm-up. A schedule has no state
to save: a resumed run calls the function with a later step. Lengths are in steps and may be
fractions. ``start_factor`` is the ratio of the rate at step 0 to ``peak``, as in `warmup`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def warmup(step: float, *, peak: float, warmup_steps: float, start_factor: float = 0.0) -> float:
    """Linear warm-up from start_factor * peak at step 0 to peak at step ``warmup_steps``.

    start_factor is 0 in the LARS papers, 1 / workers in Goyal et al. (arXiv 1706.02677, section
    2.2), and 1 / multiplier in the gradual warm-up of cmpark0126/pytorch-LARS.
    """
    if step >= warmup_steps:
        return peak
    return peak * (start_factor + (1 - start_factor) * step / warmup_steps)


def constant_warmup(
    step: float, *, peak: float, warmup_steps: float, start_factor: float = 0.1
) -> float:
    """Constant rate start_factor * peak before step ``warmup_steps``, then ``peak``."""
    return peak * start_factor if step < warmup_steps else peak


def polynomial(
    step: float,
    *,
    peak: float,
    total_steps: float,
    warmup_steps: float = 0,
    end_lr: float = 0.0,
    power: float = 2.0,
    start_factor: float = 0.0,
) -> float:
    """Linear warm-up, then polynomial decay.

    With W = warmup_steps, D = total_steps and start_factor = 0:

        step < W:    peak * step / W
        step >= W:   (peak - end_lr) * (1 - min(step - ceil(W), D - W) / (D - W)) ** power + end_lr

    If there is a warm-up, step 0 has the rate start_factor * peak. Step ceil(W) has exactly ``peak``.

    Args:
        step: Optimizer step, from 0.
        peak: Rate at the end of the warm-up.
        total_steps: Steps of the whole run, including the warm-up.
        warmup_steps: Steps of the warm-up.
        end_lr: Rate at the end of the run.
        power: Exponent of the decay; 1 is linear.
        start_factor: As in `warmup`.

    References:
        You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", arXiv 1708.03888,
        section 5. Steps are counted as in NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch.
    """
    if step < warmup_steps:
        return warmup(step, peak=peak, warmup_steps=warmup_steps, start_factor=start_factor)
    decay_steps = total_steps - warmup_steps
    decayed = max(0.0, step - math.ceil(warmup_steps))
    left = 1 - min(1.0, decayed / decay_steps) if decay_steps > 0 else 0.0
    return (peak - end_lr) * left**power + end_lr


def cosine(
    step: float,
    *,
    peak: float,
    total_steps: float,
    warmup_steps: float = 0,
    end_lr: float = 0.0,
    start_factor: float = 0.0,
) -> float:
    """Linear warm-up, then half a cosine down to ``end_lr`` at step ``total_steps``.

    With end_lr = 0.001 * peak, peak = lr * batch / 256 and a warm-up of 20 epochs, it is the
    "lars-warm" schedule of KhoiDOO/tvlars and Barlow Twins. Their schedule rises again after
    ``total_steps``; this one stays at ``end_lr``.
    """
    if step < warmup_steps:
        return warmup(step, peak=peak, warmup_steps=warmup_steps, start_factor=start_factor)
    decay_steps = total_steps - warmup_steps
    done = min(1.0, (step - warmup_steps) / decay_steps) if decay_steps > 0 else 1.0
    return end_lr + (peak - end_lr) * (1 + math.cos(math.pi * done)) / 2


def step_decay(
    step: float,
    *,
    peak: float,
    milestones: Sequence[float],
    gamma: float = 0.1,
    warmup_steps: float = 0,
    start_factor: float = 0.0,
) -> float:
    """Linear warm-up, then multiply the rate by ``gamma`` at each milestone (in steps).

    Goyal et al., "Accurate, Large Minibatch SGD" (arXiv 1706.02677), use start_factor 1 / workers
    and milestones after 30, 60 and 80 epochs.
    """
    if step < warmup_steps:
        return warmup(step, peak=peak, warmup_steps=warmup_steps, start_factor=start_factor)
    return float(peak * gamma ** sum(step >= milestone for milestone in milestones))


def epochwise_polynomial(
    step: float,
    *,
    peak: float,
    steps_per_epoch: int,
    warmup_epochs: int,
    decay_epochs: int,
    start_factor: float = 0.5,
    end_lr: float = 1e-4,
    power: float = 2.0,
) -> float:
    """Warm-up in one stair per epoch, one epoch at ``peak``, then polynomial decay at each step.

    This is the schedule that the training loop of cmpark0126/pytorch-LARS produces. Each epoch of
    the warm-up has the rate that a linear warm-up reaches at the end of that epoch. The decay, over
    decay_epochs * steps_per_epoch steps, begins in epoch warmup_epochs + 1 with its step 2.
    """
    epoch = step // steps_per_epoch
    if epoch <= warmup_epochs:
        return warmup(epoch + 1, peak=peak, warmup_steps=warmup_epochs, start_factor=start_factor)
    return polynomial(
        step - (warmup_epochs + 1) * steps_per_epoch + 2,
        peak=peak,
        total_steps=decay_epochs * steps_per_epoch,
        end_lr=end_lr,
        power=power,
    )


def ramp(step: float, *, peak: float, total_steps: float, start_lr: float) -> float:
    """Geometric growth from ``start_lr`` at step 0 to ``peak`` at the last step of the run.

    It shows at which learning rate the training diverges, and at which it makes the best progress.

    Raises:
        ValueError: ``start_lr`` or ``peak`` is not positive.
    """
    if not (start_lr > 0 and peak > 0):
        raise ValueError(f"start_lr={start_lr} and peak={peak} must be more than 0")
    done = min(1.0, step / (total_steps - 1)) if total_steps > 1 else 1.0
    return float(start_lr ** (1 - done) * peak**done)


SCHEDULES: dict[str, Callable[..., float]] = {
    function.__name__: function
    for function in (
        warmup,
        constant_warmup,
        polynomial,
        cosine,
        step_decay,
        epochwise_polynomial,
        ramp,
    )
}


def scale_lr(lr: float, *, factor: float, rule: str = "linear") -> float:
    """The learning rate for a batch that is ``factor`` times larger.

    Args:
        lr: Rate for the smaller batch.
        factor: Ratio of the batch sizes.
        rule: "keep": lr; "linear": lr * factor (Krizhevsky 2014, arXiv 1404.5997; Goyal et al.);
            "sqrt": lr * sqrt(factor) (Krizhevsky 2014; You et al. for LAMB).

    Raises:
        ValueError: The rule is unknown, or the factor is not positive.
    """
    if not factor > 0:
        raise ValueError(f"factor={factor} must be more than 0")
    powers = {"keep": 0.0, "linear": 1.0, "sqrt": 0.5}
    if rule not in powers:
        raise ValueError(f"rule={rule!r} is not known; choose one of: {', '.join(powers)}")
    return float(lr * factor ** powers[rule])
