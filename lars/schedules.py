"""Learning-rate schedules, as functions of the step and as torch schedulers.

Every schedule is a pure function. ``step`` comes first and counts optimizer steps from 0; the other
arguments are keywords, and ``peak`` is the rate at the end of the warm-up. A schedule has no state
to save: a resumed run calls the function with a later step. Lengths are in steps and may be
fractions.

`FunctionLR` turns any of them into a `torch.optim.lr_scheduler.LRScheduler`. `PolynomialWarmup` and
`GradualWarmup` carry the names that other projects use. Their state consists of numbers and
strings, which ``torch.load(weights_only=True)`` accepts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, ReduceLROnPlateau, SequentialLR


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
) -> float:
    """Linear warm-up from 0, then polynomial decay.

    With W = warmup_steps and D = total_steps:

        step < W:    peak * step / W
        step >= W:   (peak - end_lr) * (1 - min(step - ceil(W), D - W) / (D - W)) ** power + end_lr

    If there is a warm-up, step 0 has the rate 0. Step ceil(W) has exactly ``peak``.

    Args:
        step: Optimizer step, from 0.
        peak: Rate at the end of the warm-up.
        total_steps: Steps of the whole run, including the warm-up.
        warmup_steps: Steps of the warm-up.
        end_lr: Rate at the end of the run.
        power: Exponent of the decay; 1 is linear.

    References:
        You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", arXiv 1708.03888,
        section 5. Steps are counted as in NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch.
    """
    if step < warmup_steps:
        return warmup(step, peak=peak, warmup_steps=warmup_steps)
    decay_steps = total_steps - warmup_steps
    decayed = max(0.0, step - math.ceil(warmup_steps))
    left = 1 - min(1.0, decayed / decay_steps) if decay_steps > 0 else 0.0
    return (peak - end_lr) * left**power + end_lr


def cosine(
    step: float, *, peak: float, total_steps: float, warmup_steps: float = 0, end_lr: float = 0.0
) -> float:
    """Linear warm-up from 0, then half a cosine down to ``end_lr`` at step ``total_steps``.

    With end_lr = 0.001 * peak, peak = lr * batch / 256 and a warm-up of 20 epochs, it is the
    "lars-warm" schedule of KhoiDOO/tvlars and Barlow Twins. Their schedule rises again after
    ``total_steps``; this one stays at ``end_lr``.
    """
    if step < warmup_steps:
        return warmup(step, peak=peak, warmup_steps=warmup_steps)
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


SCHEDULES: dict[str, Callable[..., float]] = {
    function.__name__: function
    for function in (warmup, constant_warmup, polynomial, cosine, step_decay, epochwise_polynomial)
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


# ------------------------------------------------------------------------------ torch schedulers

_LENGTHS = ("total_steps", "decay_steps", "steps_per_epoch", "decay_epochs")


def _number(name: str, value: Any) -> float:
    """Check an option and convert it to a plain Python number, for a plain state."""
    number = value.item() if hasattr(value, "item") else value
    if not isinstance(number, int | float):
        raise TypeError(f"{name}={value!r} must be a number")
    if not 0 <= number < math.inf or (number == 0 and name in _LENGTHS):
        least = "more than 0" if name in _LENGTHS else "0 or more"
        raise ValueError(f"{name}={number} must be finite and {least}")
    return number


def _numbers(name: str, values: Any) -> list[float]:
    """Check and convert a sequence of numbers."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise TypeError(f"{name}={values!r} must be a sequence of numbers")
    return [_number(name, value) for value in values]


class FunctionLR(LRScheduler):
    """A schedule of `SCHEDULES` as a torch scheduler; call ``step`` once per optimizer step.

    Args:
        optimizer: The optimizer; the lr of each group is its ``peak``.
        schedule: A name in `SCHEDULES`.
        last_epoch: The last completed step, or -1 at the start.
        **options: The keyword arguments of the schedule except ``peak``.

    Raises:
        ValueError: The schedule is unknown, or an option is negative or not finite.
        TypeError: An option is missing, unknown, or not a number.

    Example:
        FunctionLR(optimizer, "cosine", total_steps=1000, warmup_steps=50)
    """

    def __init__(
        self, optimizer: Optimizer, schedule: str, last_epoch: int = -1, **options: Any
    ) -> None:
        if schedule not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise ValueError(f"schedule={schedule!r} is not known; choose one of: {known}")
        self.schedule = schedule
        self.options = {
            name: _numbers(name, value) if name == "milestones" else _number(name, value)
            for name, value in options.items()
        }
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """The rate of each group at the current step."""
        rate = SCHEDULES[self.schedule]
        return [rate(self.last_epoch, peak=lr, **self.options) for lr in self.base_lrs]


class PolynomialWarmup(FunctionLR):
    """`polynomial` as a torch scheduler; call ``step`` once per optimizer step.

    Without a warm-up it is the PolynomialLRDecay of cmpark0126/pytorch-LARS.

    Args:
        optimizer: The optimizer; the lr of each group is its peak.
        decay_steps: ``total_steps`` of `polynomial`.
        warmup_steps: As in `polynomial`; so are ``end_lr`` and ``power``.
        last_epoch: The last completed step, or -1 at the start.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        decay_steps: float,
        warmup_steps: float = 0,
        end_lr: float = 1e-4,
        power: float = 1.0,
        last_epoch: int = -1,
    ) -> None:
        super().__init__(
            optimizer,
            "polynomial",
            last_epoch,
            total_steps=_number("decay_steps", decay_steps),
            warmup_steps=warmup_steps,
            end_lr=end_lr,
            power=power,
        )


class GradualWarmup(LRScheduler):
    """Warm-up from the lr of each group to ``multiplier`` times that, then another scheduler.

    Step s <= total_epoch has the rate lr * ((multiplier - 1) * s / total_epoch + 1). One step later
    the next scheduler begins with its own step 0, and with multiplier * lr as its base.

    A `ReduceLROnPlateau` needs a metric for each call of `step`, so it is called once per epoch.
    If it is the next scheduler, the first epoch already has the rate of step 1, and the first call
    of `step` beyond total_epoch is its first, as in cmpark0126/pytorch-LARS.

    Args:
        optimizer: The optimizer.
        multiplier: Ratio of the peak rate to the lr of the group, 1 or more.
        total_epoch: Length of the warm-up, in calls of `step`.
        after_scheduler: The next scheduler, for the same optimizer; None: the rate stays constant.

    Raises:
        ValueError: multiplier is less than 1, or after_scheduler belongs to another optimizer.
        TypeError: after_scheduler consists of several, which would not start from the peak.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        multiplier: float,
        total_epoch: float,
        after_scheduler: LRScheduler | None = None,
    ) -> None:
        self.multiplier = _number("multiplier", multiplier)
        self.total_epoch = _number("total_epoch", total_epoch)
        if self.multiplier < 1:
            raise ValueError(f"multiplier={multiplier} must be 1 or more")
        if isinstance(after_scheduler, SequentialLR | ChainedScheduler | GradualWarmup):
            kind = type(after_scheduler).__name__
            raise TypeError(f"after_scheduler must be a single scheduler, not {kind}")
        if after_scheduler is not None and after_scheduler.optimizer is not optimizer:
            raise ValueError("after_scheduler must have the same optimizer")
        self.after_scheduler = after_scheduler
        super().__init__(optimizer)
        if isinstance(after_scheduler, ReduceLROnPlateau):
            if self.total_epoch >= 1:
                self._initial_step()
        elif after_scheduler is not None:
            after_scheduler.base_lrs = [lr * self.multiplier for lr in self.base_lrs]

    def get_lr(self) -> list[Any]:
        """The rate of each group at the current step of the warm-up."""
        factor = warmup(
            self.last_epoch,
            peak=self.multiplier,
            warmup_steps=self.total_epoch,
            start_factor=1 / self.multiplier,
        )
        return [lr * factor for lr in self.base_lrs]

    def step(self, metrics: Any = None) -> None:
        """Advance by one step; ``metrics`` is for a `ReduceLROnPlateau` after the warm-up."""
        first = self.last_epoch <= self.total_epoch
        if self.after_scheduler is None or first:
            super().step()
        else:
            self.last_epoch += 1
        if self.after_scheduler is not None and self.last_epoch > self.total_epoch:
            self._step_after(self.after_scheduler, metrics, first)
            self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    @staticmethod
    def _step_after(scheduler: LRScheduler, metrics: Any, first: bool) -> None:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(metrics)
        elif first:  # start it at the peak; not every schedule has its base as the first rate
            scheduler.last_epoch = -1
            scheduler._initial_step()
        else:
            scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of this scheduler and, as ``after_scheduler``, that of the next one."""
        state = super().state_dict()
        if self.after_scheduler is not None:
            state["after_scheduler"] = self.after_scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict` from schedulers of the same kinds."""
        own = dict(state_dict)
        after = own.pop("after_scheduler")
        super().load_state_dict(own)
        if self.after_scheduler is not None:
            self.after_scheduler.load_state_dict(after)
