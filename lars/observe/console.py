"""What a run prints: a summary, a progress bar or at least one line per minute, one line per epoch, and warnings."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from lars.learner.learner import StepResult
from lars.observe import summary
from lars.observe.advice import warnings
from lars.observe.observer import Observer, Training
from lars.observe.output import say
from lars.observe.time_left import TimeLeft

# Without a progress bar, a line is printed at least this often, in seconds.
INTERVAL = 60.0

# The time left comes before the metrics, because a narrow terminal cuts the end.
BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}"


class LauncherBar:
    """Stream for a progress bar under ``launch/mpirun.sh``.

    mpirun passes on only complete lines. Each state of the bar is sent as a line that starts with the character RS, and
    ``launch/mpirun_output.py`` draws it.
    """

    def __init__(self) -> None:
        """Create a stream that writes to stderr."""
        self.encoding = sys.stderr.encoding
        self._text = ""

    def write(self, text: str) -> None:
        """Collect the text that tqdm writes."""
        self._text += text

    def flush(self) -> None:
        """Send the current state of the bar."""
        if self._text:
            print(f"\x1e{self._text.split(chr(13))[-1].rstrip()}", file=sys.stderr, flush=True)
        self._text = ""


def bar_options() -> dict[str, Any] | None:
    """Options of tqdm for a progress bar. None if there is no terminal.

    ``launch/mpirun.sh`` sets LARS_TERMINAL to the width of its terminal.
    """
    columns = os.environ.get("LARS_TERMINAL", "")
    if columns.isdigit():
        return {"file": LauncherBar(), "ncols": int(columns) - 1}
    return {"file": sys.stderr, "dynamic_ncols": True} if sys.stderr.isatty() else None


class Console(Observer):
    """Prints the state of the run.

    A thread prints a line if nothing else was printed for a minute. So a log file also shows that a long step, a
    validation or a checkpoint makes progress.
    """

    def __init__(self, training: Training) -> None:
        """Observe `training`. Nothing is printed yet."""
        super().__init__(training)
        self.bar: tqdm | None = None
        self.bar_options = bar_options()
        self.bad_images = list(training.progress.bad_images)
        self.time_left = TimeLeft(training)
        self.last_line = time.monotonic()
        self._over = threading.Event()

    def start(self) -> None:
        """Print the summary, and warnings about doubtful settings."""
        say(summary.summary(self.training))
        for warning in warnings(self.training):
            say(f"warning: {warning}")
        threading.Thread(target=self._keep_reporting, daemon=True, name="console").start()

    def _keep_reporting(self) -> None:
        """Print the state whenever no line was printed for a minute and there is no progress bar."""
        while not self._over.wait(max(0.0, self.last_line + INTERVAL - time.monotonic())):
            if not self.training.phase():
                return  # the job has ended with an error, and this process goes on
            if time.monotonic() < self.last_line + INTERVAL:
                continue
            if self.bar is None:
                say(self._state())
            self.last_line = time.monotonic()

    def _state(self) -> str:
        """The state of the run in a line of a log file."""
        epoch, step, steps = self._place()
        parts = (
            f"epoch {epoch}  step {step}/{steps}",
            self._metrics(self.training.learner.task.scales),
            self.time_left.text(),
            f"now: {self.training.phase()}",
        )
        return "  ".join(filter(None, parts))

    def _metrics(self, scales: Mapping[str, float]) -> str:
        """The last reading of these metrics, the learning rate and the speed. Empty before the first reading."""
        reading = self.training.progress.reading
        if not reading:
            return ""
        speed = f"{reading['images_per_second']:.0f} images/s"
        return f"{summary.measured(scales, reading)} lr {reading['lr']:.4g}  {speed}"

    def _place(self) -> tuple[int, int, int]:
        """The current epoch, from 1, the steps taken in it, and its steps."""
        progress, steps = self.training.progress, self.training.run.plan.steps_per_epoch
        epoch, step = divmod(max(progress.step - 1, 0), steps)
        return epoch + 1, min(step + 1, progress.step), steps

    def step(self, result: StepResult) -> None:
        """Show progress, and report a skipped step."""
        progress = self.training.progress
        self.time_left.step(result)
        if self.bar_options is not None:
            self._advance_bar()
        if result.stop:
            self.close()
        if not result.taken:
            total = progress.skipped
            self._say(
                f"warning: step {progress.step} was skipped ({total} in total): {result.cause}"
            )

    def _advance_bar(self) -> None:
        epoch, step, steps = self._place()
        if self.bar is None:
            self.bar = tqdm(
                desc=f"epoch {epoch}", total=steps, initial=step - 1, leave=False, bar_format=BAR,
                **(self.bar_options or {}),
            )  # fmt: skip
        task = self.training.learner.task
        main = {name: task.scales[name] for name in dict.fromkeys(("loss", task.best))}
        note = "  ".join(filter(None, (self.time_left.text(), self._metrics(main))))
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update()
        if step == steps:
            self._close_bar()

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None

    def _say(self, text: str) -> None:
        say(text)
        self.last_line = time.monotonic()

    def close(self) -> None:
        """Remove the progress bar, and stop the thread."""
        self._over.set()
        self._close_bar()

    def validated(self) -> None:
        """Print the line of the epoch."""
        self._say(summary.epoch_line(self.training))
        self.saved()

    def saved(self) -> None:
        """Report newly found unreadable images."""
        found = self.training.progress.bad_images
        if found != self.bad_images:
            count = summary.counted(len(found), "image")
            self._say(f"warning: {count} cannot be read; bad_images.json lists them")
            self.bad_images = list(found)

    def end(self) -> None:
        """Print how the run ended."""
        self.close()
        say(summary.closing(self.training))
