"""``--profile N``: records with torch.profiler what the root does in six steps."""

from __future__ import annotations

import os
from typing import Any

from torch.profiler import ProfilerActivity, profile

from lars.errors import UsageError
from lars.learner.learner import StepResult
from lars.observe.observer import Observer, Training
from lars.observe.output import say
from lars.observe.summary import table
from lars.run.files import TEMPORARY

# Steps in a profile, and operations in the printed table.
STEPS, ROWS = 6, 5


def borders_profile(first: int | None, step: int) -> bool:
    """Whether a profile of --profile `first` begins or ends after a step."""
    return first is not None and step in (first - 1, first + STEPS - 1)


class Profile(Observer):
    """Profiles the steps N to N + 5 of the run on the root, with N from --profile.

    The trace is a file in the run folder for Perfetto, Chrome or TensorBoard's profiler plugin. The most expensive
    operations are printed. The weights of the run do not change.
    """

    def __init__(self, training: Training) -> None:
        """Observe `training`. Nothing is recorded yet.

        Raises:
            UsageError: The run ends before the first step to profile.
        """
        super().__init__(training)
        self.first = training.config.profile
        self.profiler: profile | None = None
        self.steps = 0
        last = training.run.plan.last_step(training.config.max_steps)
        if self.first is not None and self.first > last:
            raise UsageError(
                f"--profile {self.first}: the run ends after step {last}; use a smaller number"
            )

    def start(self) -> None:
        """Begin at once if the first step of this job is to be profiled."""
        step = self.training.progress.step
        if self.first is not None and self.first <= step:
            say(
                f"warning: --profile {self.first} has no effect, because the run resumes after step {step}"
            )
        self._begin()

    def step(self, result: StepResult) -> None:
        """Begin before the first of the steps, and write the profile after the last one."""
        if self.profiler is not None:
            self.steps += 1
            if self.steps == STEPS or result.stop:
                self._finish()
        self._begin()

    def end(self) -> None:
        """Write the profile of a run that ends during it."""
        if self.profiler is not None:
            self._finish()

    def _begin(self) -> None:
        if self.first is None or self.training.progress.step + 1 != self.first:
            return
        activities = [ProfilerActivity.CPU]
        if self.training.learner.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities)
        self.profiler.start()

    def _finish(self) -> None:
        profiler, self.profiler = self.profiler, None
        assert profiler is not None
        profiler.stop()
        path = self.training.run.folder / f"steps-{self.first}.pt.trace.json.gz"
        temporary = path.with_name(f"{TEMPORARY}{path.name}")
        try:
            profiler.export_chrome_trace(str(temporary))
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            say(f"warning: {path} cannot be written: {error}")
        say(
            f"the most expensive operations of {self.steps} steps from step {self.first}; the trace is in {path}\n"
            f"{table(most_expensive(profiler, self.steps))}"
        )


def most_expensive(profiler: profile, steps: int) -> list[tuple[str, str]]:
    """The operations with the largest times of their own, as rows of a table.

    The time of an operation does not include those that it calls. It is time on the GPU if there is one, otherwise time
    on the CPU.
    """
    events: Any = profiler.key_averages()
    on_gpu = any(event.self_device_time_total for event in events)
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {event.key: (getattr(event, kind), event.count) for event in events}
    total = sum(time for time, _ in times.values()) or 1.0
    largest = sorted(times.items(), key=lambda item: -item[1][0])[:ROWS]
    device = "GPU" if on_gpu else "CPU"
    return [
        (
            name,
            f"{time / total:6.1%}  {time / steps / 1000:9.3f} ms on the {device}, {count / steps:.1f} calls per step",
        )
        for name, (time, count) in largest
    ]
