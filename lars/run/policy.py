"""When to write a checkpoint."""

from __future__ import annotations

import time

from lars.config.config import Config
from lars.learner.learner import StepResult


class CheckpointPolicy:
    """After every epoch, every so many steps or minutes, after the last step, and when the job is asked to stop."""

    def __init__(self, config: Config, last_step: int) -> None:
        """Read the flags; `last_step` is how many steps this job takes at most."""
        self.steps = config.checkpoint_steps
        self.seconds = None if config.checkpoint_minutes is None else 60 * config.checkpoint_minutes
        self.last_step = last_step
        self.saved()

    def saved(self) -> None:
        """Start to count the minutes now."""
        self.since = time.monotonic()

    def time_is_up(self) -> bool:
        """Whether enough minutes have passed. Only the root's clock counts: it tells the others at the next step."""
        return self.seconds is not None and time.monotonic() - self.since >= self.seconds

    def is_due(self, result: StepResult, steps_done: int, *, ends_epoch: bool) -> bool:
        """Whether to save after a step; the same on all ranks."""
        by_steps = self.steps is not None and steps_done % self.steps == 0
        at_the_end = steps_done == self.last_step
        return result.stop or result.save or by_steps or ends_epoch or at_the_end
