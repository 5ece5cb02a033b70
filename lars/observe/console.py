"""What a run prints: a summary, a progress bar or one line per minute, one line per epoch, and warnings."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from tqdm import tqdm

from lars.learner.learner import StepResult
from lars.observe import summary
from lars.observe.advice import warnings
from lars.observe.observer import Observer, Training
from lars.observe.output import say


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
    """Prints the state of the run."""

    def __init__(self, training: Training) -> None:
        """Observe `training`. Nothing is printed yet."""
        super().__init__(training)
        self.bar: tqdm | None = None
        self.bar_options = bar_options()
        self.bad_images = list(training.progress.bad_images)
        self.last_line = time.monotonic()

    def start(self) -> None:
        """Print the summary, and warnings about doubtful settings."""
        say(summary.summary(self.training))
        for warning in warnings(self.training):
            say(f"warning: {warning}")

    def step(self, result: StepResult) -> None:
        """Show progress, and report a skipped step."""
        progress = self.training.progress
        values = progress.new_reading()
        note = ""
        if values:
            scales = self.training.learner.task.scales
            note = f"{summary.measured(scales, values)} lr {values['lr']:.4g}"
        if self.bar_options is not None:
            self._advance_bar(note)
        elif note and time.monotonic() - self.last_line > 60:
            self.last_line = time.monotonic()
            epoch, step = self._place()
            say(f"epoch {epoch}  step {step}/{self.training.run.plan.steps_per_epoch}  {note}")
        if result.stop:
            self.close_bar()
        if not result.taken:
            total = progress.skipped
            say(f"warning: step {progress.step} was skipped ({total} in total): {result.cause}")

    def _place(self) -> tuple[int, int]:
        """The current epoch, from 1, and the steps taken in it."""
        epoch, step = divmod(
            self.training.progress.step - 1, self.training.run.plan.steps_per_epoch
        )
        return epoch + 1, step + 1

    def _advance_bar(self, note: str) -> None:
        epoch, step = self._place()
        total = self.training.run.plan.steps_per_epoch
        if self.bar is None:
            self.bar = tqdm(
                desc=f"epoch {epoch}", total=total, initial=step - 1, leave=False, unit="step",
                **(self.bar_options or {}),
            )  # fmt: skip
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update()
        if step == total:
            self.close_bar()

    def close_bar(self) -> None:
        """Remove the progress bar."""
        if self.bar is not None:
            self.bar.close()
        self.bar = None

    def validated(self) -> None:
        """Print the line of the epoch."""
        say(summary.epoch_line(self.training))
        self.saved()

    def saved(self) -> None:
        """Report newly found unreadable images."""
        found = self.training.progress.bad_images
        if found != self.bad_images:
            count = summary.counted(len(found), "image")
            say(f"warning: {count} cannot be read; bad_images.json lists them")
            self.bad_images = list(found)

    def end(self) -> None:
        """Print how the run ended."""
        self.close_bar()
        say(summary.closing(self.training))
