"""How long an epoch and the run will still take, from the speed of the last steps of this job."""

from __future__ import annotations

from collections import deque

from tqdm import tqdm

from lars.config.plan import Plan
from lars.learner.learner import StepResult
from lars.observe.observer import Training

# So many of the last steps give the speed.
STEPS = 100


class TimeLeft:
    """Measures the speed of the last steps, and estimates the remaining time.

    The first step of a job does not count, because it allocates memory and may compile the network.
    """

    def __init__(self, training: Training) -> None:
        """Measure the steps of `training`."""
        self.training = training
        self.has_started = False
        self.steps: deque[tuple[int, float]] = deque(maxlen=STEPS)

    def step(self, result: StepResult) -> None:
        """Count a step."""
        if self.has_started:
            self.steps.append((result.samples, result.seconds))
        self.has_started = True

    def images_per_second(self) -> float:
        """Speed over all ranks. 0 as long as it is not known."""
        steps = tuple(self.steps)  # the thread of the console may read while a step is added
        seconds = sum(seconds for _, seconds in steps)
        return sum(samples for samples, _ in steps) / seconds if seconds else 0.0

    def epoch(self) -> float:
        """Seconds of training until the end of the current epoch. The speed must be known."""
        _, done, length = self._plan()
        return self._training(min(-(-done // length) * length, self._last()))

    def run(self) -> float:
        """Seconds until the end of the run, with its validations. The speed must be known."""
        plan, done, length = self._plan()
        ends = range(done - done % length + length, self._last() + 1, length)
        validations = sum(map(plan.validates, ends))
        return self._training(self._last()) + validations * self._validation()

    def _plan(self) -> tuple[Plan, int, int]:
        """The plan, the steps so far, and the steps of an epoch."""
        plan = self.training.run.plan
        return plan, self.training.progress.step, plan.steps_per_epoch

    def _last(self) -> int:
        return self.training.run.plan.last_step(self.training.config.max_steps)

    def _training(self, end: int) -> float:
        plan = self.training.run.plan
        images = plan.samples_before(end) - plan.samples_before(self.training.progress.step)
        return images / self.images_per_second()

    def _validation(self) -> float:
        """Seconds of a validation: of the last one, or at the speed of training."""
        training = self.training
        rows = [training.progress.last(split) for split in training.learner.networks()]
        images = training.source.val_size * len(rows)
        known = [row["seconds"] for row in rows if row is not None]
        return sum(known) if known else images / self.images_per_second()

    def text(self) -> str:
        """``epoch 03:12, run 14:02:11 left``, or nothing as long as the speed is not known."""
        if not self.images_per_second():
            return ""
        epoch, run = (tqdm.format_interval(seconds) for seconds in (self.epoch(), self.run()))
        return f"epoch {epoch}, run {run} left"
