"""Records in the run folder: config.json, metrics.jsonl, and TensorBoard's curves."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from lars.errors import CheckpointError
from lars.learner.learner import StepResult
from lars.observe.console import say
from lars.observe.observer import Observer, Training
from lars.run.files import atomic_write
from lars.run.progress import Row


class RunLog(Observer):
    """Writes the run's records.

    A full disk loses no line: what cannot be written is reported, kept in memory, and written later.
    """

    def __init__(self, training: Training) -> None:
        """Log into the run folder of `training`; nothing is written yet."""
        super().__init__(training)
        folder = training.run.folder
        self.metrics = GrowingFile(folder / "metrics.jsonl")
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self.curves = GrowingFile(folder / name)
        self.rows_written = 0

    def start(self) -> None:
        """Begin the records with what the checkpoint holds, and nothing beyond it.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        run, progress = self.training.run, self.training.progress
        run.record("config.json", run.description(progress))
        try:
            with atomic_write(self.metrics.path) as file:
                file.writelines(_line(row) for row in progress.history)
        except OSError as error:
            raise CheckpointError(f"--log-dir: {run.folder} cannot be written: {error}") from error
        self.rows_written = len(progress.history)
        self._restart_curves()

    def _restart_curves(self) -> None:
        """Tell TensorBoard to forget points beyond the checkpoint: a job that was killed may have drawn some.

        They are drawn again. The points of the checkpoint's own step are drawn again now, because the job may have been
        killed before it drew them.
        """
        progress = self.training.progress
        again = SessionLog(status=SessionLog.START)
        version = Event(file_version="brain.Event:2")
        first = progress.step if progress.new_reading() else progress.step + 1
        self.curves.add(_events(version, Event(step=first, session_log=again)))
        if progress.new_reading():
            self.scalars("train", progress.new_reading(), progress.step)
            self._draw([row for row in progress.history if row["step"] == progress.step])

    def step(self, result: StepResult) -> None:
        """Draw the training metrics whenever they were read."""
        values = self.training.progress.new_reading()
        if values:
            self.scalars("train", values, self.training.progress.step)

    def validated(self) -> None:
        """Add the epoch's rows, and draw the validation metrics."""
        new = self.training.progress.history[self.rows_written :]
        for row in new:
            self.metrics.add(_line(row))
        self._draw(new)
        self.rows_written += len(new)

    def _draw(self, rows: list[Row]) -> None:
        """Draw the validation metrics of these rows."""
        for row in rows:
            if row["split"] != "train":
                values = {name: row[name] for name in self.training.learner.task.scales}
                self.scalars(row["split"], values, row["step"])

    def saved(self) -> None:
        """Add the rows that the checkpoint holds, and try again to write what a full disk refused."""
        self.validated()
        for file in (self.metrics, self.curves):
            file.add(b"")

    def end(self) -> None:
        """Try again to write what a full disk refused."""
        self.saved()

    def scalars(self, split: str, values: Mapping[str, float], step: int) -> None:
        """Draw `values` at optimizer step `step` (from 1) in TensorBoard, as ``split/name``."""
        drawn = [Summary.Value(tag=f"{split}/{name}", simple_value=v) for name, v in values.items()]
        self.curves.add(_events(Event(step=step, summary=Summary(value=drawn))))


class GrowingFile:
    """A file that grows by complete pieces.

    If the disk refuses a piece, no part of it stays in the file, and it waits for the next call.
    """

    def __init__(self, path: Path) -> None:
        """Append to `path`."""
        self.path = path
        self.waiting = b""
        self.reported = False

    def add(self, piece: bytes) -> None:
        """Append a piece, after those that wait."""
        self.waiting += piece
        try:
            with open(self.path, "ab", buffering=0) as file:
                complete = file.tell()
                try:
                    rest = memoryview(self.waiting)
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    file.truncate(complete)
                    raise
        except OSError as error:
            if not self.reported:
                say(f"warning: {self.path} cannot grow: {error}; new lines wait in memory")
            self.reported = True
        else:
            self.waiting, self.reported = b"", False


def _events(*events: Event) -> bytes:
    """Events as a piece of TensorBoard's file."""
    piece = io.BytesIO()
    for event in events:
        event.wall_time = time.time()
        RecordWriter(piece).write(event.SerializeToString())
    return piece.getvalue()


def _line(row: Row) -> bytes:
    """A row as JSON, which has null and no NaN."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return (json.dumps(finite) + "\n").encode()
