"""How the host learns the results of the steps that it has launched, without a wait for the newest of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lars.learner.result import Notice, StepResult, result_of


def copied_to_host(numbers: Tensor) -> Callable[[], list[float]]:
    """Start to copy a vector to the host. The returned function waits for the copy and returns the numbers."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    pinned.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # the host sleeps while it waits
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        numbers: list[float] = pinned.tolist()
        return numbers

    return read


class Times(NamedTuple):
    """The times of a `StepResult` in seconds."""

    seconds: float = 0.0
    data_seconds: float = 0.0
    exchange_seconds: float = 0.0


@dataclass
class Launched:
    """A step that the device may still be computing.

    Attributes:
        read: Returns its `Notice` as a list. It may wait for the device.
        samples: Samples of the step over all ranks.
        layers: Names of the parameters with a gradient.
        skipped: Whether the step changes nothing: a bool if the host knows it, else a tensor on the device.
        times: The times of the result.
    """

    read: Callable[[], list[float]]
    samples: int
    layers: list[str]
    skipped: bool | Tensor
    times: Times = field(default_factory=Times)

    @property
    def is_known(self) -> bool:
        """Whether the host knows the result already."""
        return isinstance(self.skipped, bool)

    def result(self) -> StepResult:
        """The result, except for the times."""
        return result_of(Notice(*self.read()), self.samples, self.layers)

    def timed(self, result: StepResult) -> StepResult:
        """The result with its times."""
        return result._replace(
            seconds=self.times.seconds,
            data_seconds=self.times.data_seconds,
            exchange_seconds=self.times.exchange_seconds,
        )


class Mailbox:
    """Delivers the results of the steps in their order, each at most one step late.

    All ranks get each result in the same call of `collect`. So they take the same decisions after the same step.

    Attributes:
        waiting: The steps whose results have not been delivered yet.
    """

    def __init__(self) -> None:
        """Start without steps."""
        self.waiting: list[Launched] = []

    def collect(self, newest: Launched, *, settle: bool) -> list[tuple[Launched, StepResult]]:
        """Add the newest step, and deliver the results of the steps before it.

        Its own result is delivered too if `settle` demands it, if the host knows it already, or if the step before it
        asks for a stop or a checkpoint. Then no result is left, and the device is idle. The request moves to the newest
        result, because it can be fulfilled only now.
        """
        earlier = [(launched, launched.result()) for launched in self.waiting]
        stop, save = any(r.stop for _, r in earlier), any(r.save for _, r in earlier)
        self.waiting = [newest]
        if not (settle or stop or save or newest.is_known):
            return earlier
        self.waiting = []
        last = newest.result()
        return [
            *((launched, r._replace(stop=False, save=False)) for launched, r in earlier),
            (newest, last._replace(stop=last.stop or stop, save=last.save or save)),
        ]
