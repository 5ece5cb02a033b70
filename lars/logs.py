"""What a run tells: console, progress bar, TensorBoard and metrics.jsonl on the root; silence elsewhere."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
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
    """The root's log.

    A disk that is full for a while costs no line: what cannot be written is told, kept, and written later.
    """

    def __init__(self, folder: Path) -> None:
        """Log into `folder`."""
        self.folder = folder
        self.metrics = _Growing(folder / "metrics.jsonl", self.say)
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self.curves = _Growing(folder / name, self.say)

    def say(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def record(self, name: str, value: Any) -> None:
        try:
            with writing(self.folder / name) as file:
                file.write((json.dumps(value, indent=2) + "\n").encode())
        except OSError as error:
            self.say(f"warning: {self.folder / name} could not be written: {error}")

    def restart(self, rows: Iterable[Row], *, step: int) -> None:
        with writing(self.metrics.path) as file:
            file.writelines(_line(row) for row in rows)
        # A run that was killed may have drawn steps after its last checkpoint; they will be drawn again.
        again = SessionLog(status=SessionLog.START)
        self.curves.add(
            _events(Event(file_version="brain.Event:2"), Event(step=step + 1, session_log=again))
        )

    def row(self, row: Row) -> None:
        self.metrics.add(_line(row))

    def scalars(self, split: str, values: Mapping[str, float], step: int) -> None:
        drawn = [Summary.Value(tag=f"{split}/{name}", simple_value=v) for name, v in values.items()]
        self.curves.add(_events(Event(step=step, summary=Summary(value=drawn))))

    def progress(self, title: str, *, total: int, start: int = 0) -> Bar:
        if sys.stderr.isatty():
            return _TerminalBar(title, total, start)
        return _Lines(title, total, start, self.say)

    def close(self) -> None:
        for file in (self.metrics, self.curves):
            file.add(b"")


class _Growing:
    """A file that grows by whole pieces.

    A piece that the disk refuses leaves no part of itself behind, and waits for the next one.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        self.waiting = b""
        self.told = False

    def add(self, piece: bytes) -> None:
        self.waiting += piece
        try:
            with open(self.path, "ab", buffering=0) as file:
                whole = file.tell()
                try:
                    rest = memoryview(self.waiting)
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    file.truncate(whole)
                    raise
        except OSError as error:
            if not self.told:
                self.say(f"warning: {self.path} cannot grow: {error}; what is to be added waits")
            self.told = True
        else:
            self.waiting, self.told = b"", False


def _events(*events: Event) -> bytes:
    """Events as a piece of TensorBoard's file."""
    piece = io.BytesIO()
    for event in events:
        event.wall_time = time.time()
        RecordWriter(piece).write(event.SerializeToString())
    return piece.getvalue()


def _line(row: Row) -> bytes:
    """A row as JSON, which knows null and not NaN."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return (json.dumps(finite) + "\n").encode()


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """Two aligned columns."""
    rows = [(name, str(value)) for name, value in rows]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
