"""The contract of an observer: it may read everything, changes nothing, and never communicates.

Observers exist only on the root, so a collective operation in an observer would hang the job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lars.config.config import Config
from lars.learner.learner import Learner, StepResult
from lars.observe.output import Curves
from lars.run.folder import Run
from lars.run.progress import Progress
from lars.run.resume import LoadedCheckpoint


@dataclass
class Training:
    """What an observer may read.

    Attributes:
        config: The flags.
        source: The source of the images.
        run: The run, with its plan `run.plan` and its folder `run.folder`.
        learner: Network, optimizer and task.
        progress: The progress of the run.
        loaded: The checkpoint that the job resumed from, if any.
        workers: Decoding processes of each rank.
        phase: Returns what this rank is doing now, such as "step 12" or "batch 3 of the validation". Empty
            after the job.
    """

    config: Config
    source: Any
    run: Run
    learner: Learner
    progress: Progress
    loaded: LoadedCheckpoint | None = None
    workers: int = 0
    phase: Callable[[], str] = str

    @cached_property
    def curves(self) -> Curves:
        """TensorBoard's curves, to which every observer may add points after the start."""
        return Curves(self.run.folder)


class Observer:
    """Reports on a training run. Override the methods that you need.

    Example:
        class Pager(Observer):
            def validated(self) -> None:
                send_message(f"top-1 {self.training.progress.last('val')['top1']:.1f} %")
    """

    def __init__(self, training: Training) -> None:
        """Observe `training`, whose values change during the run."""
        self.training = training

    def start(self) -> None:
        """Called before the first step of this job."""

    def step(self, result: StepResult) -> None:
        """Called after each step, taken or skipped. `training.progress` already counts it."""

    def validated(self) -> None:
        """Called after each validation. Its rows are the last ones of `training.progress.history`."""

    def saved(self) -> None:
        """Called after each checkpoint, even if it could not be written."""

    def end(self) -> None:
        """Called after the last step, when the final weights have been exported."""


class Observers(Observer):
    """Several observers, called in turn."""

    def __init__(self, members: Sequence[Observer]) -> None:
        """Create the group; `members` are called in this order."""
        self.members = members

    def start(self) -> None:
        for member in self.members:
            member.start()

    def step(self, result: StepResult) -> None:
        for member in self.members:
            member.step(result)

    def validated(self) -> None:
        for member in self.members:
            member.validated()

    def saved(self) -> None:
        for member in self.members:
            member.saved()

    def end(self) -> None:
        for member in self.members:
            member.end()
