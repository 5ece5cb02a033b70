"""The records in the run folder: config.json, metrics.jsonl and TensorBoard's curves."""

from __future__ import annotations

import io
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
from lars.run.records import Row, encoded


class RunLog(Observer):
    """Writes the records of the run.

    A full disk loses no records. Those that cannot be written are kept in memory and written later.
    """

    def __init__(self, training: Training) -> None:
        """Observe `training`. Nothing is written yet."""
        super().__init__(training)
        folder = training.run.folder
        self.metrics = GrowingFile(folder / "metrics.jsonl")
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self.curves = GrowingFile(folder / name)
        self.rows_written = 0

    def start(self) -> None:
        """Reset the records to the state of the checkpoint.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        run, progress = self.training.run, self.training.progress
        run.record("config.json", run.description(progress))
        try:
            with atomic_write(self.metrics.path) as file:
                file.writelines(encoded(row) for row in progress.history)
        except OSError as error:
            raise CheckpointError(f"--log-dir: {run.folder} cannot be written: {error}") from error
        self.rows_written = len(progress.history)
        self._restart_curves()

    def _restart_curves(self) -> None:
        """Make TensorBoard discard points beyond the checkpoint, which a killed job may have written.

        The resumed run writes these points again. The points of the checkpoint's own step are written now, because
        the job may have been killed before it wrote them.
        """
        progress = self.training.progress
        restart = SessionLog(status=SessionLog.START)
        version = Event(file_version="brain.Event:2")
        first = progress.step if progress.new_reading() else progress.step + 1
        self.curves.add(_events(version, Event(step=first, session_log=restart)))
        if progress.new_reading():
            self.scalars("train", progress.new_reading(), progress.step)
            self._draw([row for row in progress.history if row["step"] == progress.step])

    def step(self, result: StepResult) -> None:
        """Add the training metrics to the curves after each reading."""
        values = self.training.progress.new_reading()
        if values:
            self.scalars("train", values, self.training.progress.step)

    def validated(self) -> None:
        """Write the rows of the epoch, and add the validation metrics to the curves.

        Rows wait until a checkpoint holds their epoch. Results without a checkpoint would stop the run from resuming.
        """
        if self.training.run.failed_writes:
            return
        new = self.training.progress.history[self.rows_written :]
        if new:
            self.metrics.add(
                b"".join(map(encoded, new))
            )  # together: half a validation would count as complete
        self._draw(new)
        self.rows_written += len(new)

    def _draw(self, rows: list[Row]) -> None:
        """Add the validation metrics of these rows to the curves."""
        for row in rows:
            if row["split"] != "train":
                values = {name: row[name] for name in self.training.learner.task.scales}
                self.scalars(row["split"], values, row["step"])

    def saved(self) -> None:
        """Write the new rows of the checkpoint, and retry earlier writes that failed."""
        self.validated()
        for file in (self.metrics, self.curves):
            file.add(b"")

    def end(self) -> None:
        """Retry earlier writes that failed."""
        self.saved()

    def scalars(self, split: str, values: Mapping[str, float], step: int) -> None:
        """Add `values` to TensorBoard's curves ``split/name`` at optimizer step `step`, counted from 1."""
        drawn = [Summary.Value(tag=f"{split}/{name}", simple_value=v) for name, v in values.items()]
        self.curves.add(_events(Event(step=step, summary=Summary(value=drawn))))


class GrowingFile:
    """A file to which only complete pieces are appended.

    If a write fails, no part of the piece stays in the file. It is written with the next call.
    """

    def __init__(self, path: Path) -> None:
        """Append to `path`."""
        self.path = path
        self.waiting = b""
        self.reported = False

    def add(self, piece: bytes) -> None:
        """Append a piece after those that are still waiting."""
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
                say(
                    f"warning: {self.path} cannot be written: {error}; new records are kept in memory"
                )
            self.reported = True
        else:
            self.waiting, self.reported = b"", False


def _events(*events: Event) -> bytes:
    """Encode events for TensorBoard's file."""
    piece = io.BytesIO()
    for event in events:
        event.wall_time = time.time()
        RecordWriter(piece).write(event.SerializeToString())
    return piece.getvalue()
