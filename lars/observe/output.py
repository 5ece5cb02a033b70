"""How observers write: lines on the console, files that grow, and TensorBoard's curves."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import histogram
from tqdm import tqdm

# Upper limits of a histogram's buckets: ten for each power of ten, because norms and ratios differ by orders of
# magnitude. Smaller values count in the first bucket.
BUCKETS = [10 ** (k / 10) for k in range(-90, 91)]


def has_terminal() -> bool:
    """Whether a person reads the output on a terminal. ``launch/mpirun.sh`` sets LARS_TERMINAL to its width."""
    return sys.stdout.isatty() or os.environ.get("LARS_TERMINAL", "").isdigit()


def say(text: str) -> None:
    """Print without disturbing a progress bar. In a log file, a single line begins with the date and the time.

    A line that cannot be written, for example because the disk is full, is lost. It does not end the training.
    """
    if "\n" not in text and not has_terminal():
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}"
    with contextlib.suppress(OSError):
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


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


class Curves:
    """TensorBoard's file of a job, to which all observers add their points.

    Steps are optimizer steps, counted from 1. A job writes a single file, because TensorBoard reads only the newest
    file that grows.

    Attributes:
        first_step: TensorBoard discards the points of earlier jobs from this step on.
    """

    def __init__(self, folder: Path) -> None:
        """Write to a new file in `folder`. Nothing is written yet."""
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = GrowingFile(folder / name)
        self.first_step = 0

    def restart(self, step: int) -> None:
        """Make TensorBoard discard all earlier points from `step` on, which a killed job may have written."""
        self.first_step = step
        self._add(
            Event(file_version="brain.Event:2"),
            Event(step=step, session_log=SessionLog(status=SessionLog.START)),
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each of the curves with these names, such as ``train/loss``."""
        self.summary(
            (Summary.Value(tag=name, simple_value=value) for name, value in values.items()), step
        )

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None:
        """Add a histogram of positive values under each of these names."""
        drawn = [
            histogram(name, tensor.clamp(min=BUCKETS[0]).numpy(), BUCKETS)
            for name, tensor in values.items()
        ]
        self.summary((value for each in drawn for value in each.value), step)

    def summary(self, values: Iterable[Summary.Value], step: int) -> None:
        """Add values of any kind that TensorBoard shows."""
        self._add(Event(step=step, summary=Summary(value=values)))

    def retry(self) -> None:
        """Write what could not be written earlier."""
        self.file.add(b"")

    def _add(self, *events: Event) -> None:
        piece = io.BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(piece).write(event.SerializeToString())
        self.file.add(piece.getvalue())
