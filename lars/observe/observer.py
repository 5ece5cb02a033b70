"""The contract of an observer: it may look at everything, changes nothing, and never communicates.

Observers exist on the root only, so a collective operation in one of them would hang the job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lars.config.config import Config
from lars.learner.learner import Learner, StepResult
from lars.run.folder import Run
from lars.run.progress import Progress
from lars.run.resume import LoadedCheckpoint


@dataclass
class Training:
    """What an observer may look at.

    Attributes:
        config: The flags.
        source: Where the images come from.
        run: The run; its plan is `run.plan`, its folder `run.folder`.
        learner: Network, optimizer and task.
        progress: How far the run has come.
        loaded: The checkpoint that the job resumed from, if any.
        workers: Decoding processes of each rank.
    """

    config: Config
    source: Any
    run: Run
    learner: Learner
    progress: Progress
    loaded: LoadedCheckpoint | None = None
    workers: int = 0


class Observer:
    """Sees a training from outside. Override the methods that you need.

    Example:
        class Pager(Observer):
            def validated(self) -> None:
                send_message(f"top-1 {self.training.progress.last('val')['top1']:.1f} %")
    """

    def __init__(self, training: Training) -> None:
        """Look at `training`, which changes as the run goes on."""
        self.training = training

    def start(self) -> None:
        """The run is about to take its first step, or its first step after a checkpoint."""

    def step(self, result: StepResult) -> None:
        """A step was taken or skipped; `training.progress` already counts it."""

    def validated(self) -> None:
        """An epoch was validated: its rows are the last ones of `training.progress.history`."""

    def saved(self) -> None:
        """A checkpoint was written, or failed to be written."""

    def end(self) -> None:
        """The run has finished, and its weights are exported."""


class Observers(Observer):
    """Several observers, called in turn."""

    def __init__(self, members: Sequence[Observer]) -> None:
        """Call `members` in this order."""
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
