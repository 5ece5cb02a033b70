"""The schedules of `lars.schedules.functions` as torch schedulers.

`FunctionLR` turns any of them into a `torch.optim.lr_scheduler.LRScheduler`. `PolynomialWarmup` and
`GradualWarmup` carry the names that other projects use. Their state consists of numbers and
strings, which ``torch.load(weights_only=True)`` accepts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, ReduceLROnPlateau, SequentialLR

from lars.schedules.functions import SCHEDULES, warmup

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
