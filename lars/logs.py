"""What a run tells: console, progress bar, TensorBoard and metrics.jsonl on the root; silence elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lars.checkpoint import writing

Row = dict[str, Any]


class Silence:
    """The log of every rank but the root: it takes what it is told and says nothing."""

    def say(self, line: str) -> None:
        """Print a line."""

    def record(self, name: str, value: Any) -> None:
        """Write `value` as ``name`` (a JSON file) into the run folder."""

    def restart(self, rows: Iterable[Row], *, step: int) -> None:
        """Begin the records with the `rows` of the epochs done, and the curves after optimizer step `step`."""

    def row(self, row: Row) -> None:
        """Add one row to metrics.jsonl."""

    def scalars(self, split: str, values: Mapping[str, float], step: int) -> None:
        """Draw `values` at optimizer step `step` (from 1) in TensorBoard, as ``split/name``."""

    def progress(self, title: str, *, total: int, start: int = 0) -> Bar:
        """Open a progress bar over `total` steps, of which `start` are done."""
        return Bar()

    def close(self) -> None:
        """Write out what is still in memory."""


class Bar:
    """A progress bar that shows nothing."""

    def advance(self, note: str = "") -> None:
        """Count one step; `note` is shown beside the bar."""

    def close(self) -> None:
        """Take the bar away."""


class _TerminalBar(Bar):
    """A bar on a terminal."""

    def __init__(self, title: str, total: int, start: int) -> None:
        self.bar = tqdm(
            desc=title, total=total, initial=start, leave=False, dynamic_ncols=True, unit="step"
        )

    def advance(self, note: str = "") -> None:
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


class _Lines(Bar):
    """Lines in a batch job's output: one a minute at most."""

    def __init__(self, title: str, total: int, start: int, say: Callable[[str], None]) -> None:
        self.title, self.total, self.done, self.say = title, total, start, say
        self.spoke = time.monotonic()

    def advance(self, note: str = "") -> None:
        self.done += 1
        if time.monotonic() - self.spoke > 60 and note:
            self.spoke = time.monotonic()
            self.say(f"{self.title}  step {self.done}/{self.total}  {note}")


class RunLog(Silence):
    """The root's log."""

    def __init__(self, folder: Path) -> None:
        """Log into `folder`, which is made if it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.board: Any = None

    def say(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def record(self, name: str, value: Any) -> None:
        with writing(self.folder / name) as file:
            file.write((json.dumps(value, indent=2) + "\n").encode())

    def restart(self, rows: Iterable[Row], *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with writing(self.folder / "metrics.jsonl") as file:
            file.writelines(_line(row) for row in rows)
        # A run that was killed may have drawn steps after its last checkpoint; they will be drawn again.
        self.board = SummaryWriter(str(self.folder), purge_step=step + 1)

    def row(self, row: Row) -> None:
        with open(self.folder / "metrics.jsonl", "ab") as file:
            file.write(_line(row))

    def scalars(self, split: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.board.add_scalar(f"{split}/{name}", value, step)

    def progress(self, title: str, *, total: int, start: int = 0) -> Bar:
        if sys.stderr.isatty():
            return _TerminalBar(title, total, start)
        return _Lines(title, total, start, self.say)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def _line(row: Row) -> bytes:
    return (json.dumps(row) + "\n").encode()


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """Two aligned columns."""
    rows = [(name, str(value)) for name, value in rows]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
