"""When to write a checkpoint."""

from __future__ import annotations

import time

from lars.config.config import Config
from lars.learner.learner import StepResult


class CheckpointPolicy:
    """Saves after every epoch, every N steps or minutes, after the last step, and when the job is asked to stop."""

    def __init__(self, config: Config, last_step: int) -> None:
        """Read the flags. `last_step` is the number of steps after which this job ends."""
        self.steps = config.checkpoint_steps
        self.seconds = None if config.checkpoint_minutes is None else 60 * config.checkpoint_minutes
        self.last_step = last_step
        self.saved()

    def saved(self) -> None:
        """Restart the clock of --checkpoint-minutes."""
        self.since = time.monotonic()

    def time_is_up(self) -> bool:
        """Whether --checkpoint-minutes have passed. Only the root's clock counts; the next step informs all ranks."""
        return self.seconds is not None and time.monotonic() - self.since >= self.seconds

    def is_planned(self, steps_done: int) -> bool:
        """Whether to save after this many steps by --checkpoint-steps or at the end, whatever the steps result in."""
        by_steps = self.steps is not None and steps_done % self.steps == 0
        return by_steps or steps_done == self.last_step

    def is_due(self, result: StepResult, steps_done: int, *, ends_epoch: bool) -> bool:
        """Whether to save after a step. The answer is the same on all ranks."""
        return result.stop or result.save or ends_epoch or self.is_planned(steps_done)
