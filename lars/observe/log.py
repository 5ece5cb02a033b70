"""The records in the run folder: config.json, metrics.jsonl, metrics.csv and TensorBoard's curves."""

from __future__ import annotations

import contextlib

from lars.errors import CheckpointError
from lars.learner.learner import StepResult
from lars.observe.observer import Observer, Training
from lars.observe.output import GrowingFile
from lars.run.epochs import epochs_table, write_csv
from lars.run.files import atomic_write
from lars.run.records import Row, RunRecord, encoded


class RunLog(Observer):
    """Writes the records of the run.

    A full disk loses no records. Those that cannot be written are kept in memory and written later.
    """

    def __init__(self, training: Training) -> None:
        """Observe `training`. Nothing is written yet."""
        super().__init__(training)
        self.metrics = GrowingFile(training.run.folder / "metrics.jsonl")
        self.table = training.run.folder / "metrics.csv"
        self.curves = training.curves
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
        self._write_table()
        self._restart_curves()

    def _restart_curves(self) -> None:
        """Make TensorBoard discard points beyond the checkpoint, which a killed job may have written.

        The resumed run writes these points again. The points of the checkpoint's own step are written now, because
        the job may have been killed before it wrote them.
        """
        progress = self.training.progress
        first = progress.step if progress.new_reading() else progress.step + 1
        self.curves.restart(first)
        # The number of images is larger than that of steps, so these points are discarded too.
        self._draw_over_images([row for row in progress.history if self._images(row) >= first])
        if progress.new_reading():
            self._draw_reading()
            self._draw([row for row in progress.history if row["step"] == progress.step])

    def step(self, result: StepResult) -> None:
        """Add the training metrics to the curves after each reading."""
        self._draw_reading()

    def _draw_reading(self) -> None:
        progress = self.training.progress
        values = progress.new_reading()
        if values:
            self.curves.scalars({f"train/{name}": v for name, v in values.items()}, progress.step)

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
        self._draw_over_images(new)
        self.rows_written += len(new)
        self._write_table()

    def _write_table(self) -> None:
        """Write metrics.csv, which has one row for each epoch.

        It contains nothing that metrics.jsonl does not contain. If the disk is full, the next call writes it in full.
        """
        rows = self.training.progress.history[: self.rows_written]
        if rows:
            with contextlib.suppress(OSError):
                write_csv(epochs_table(RunRecord(self.training.run.folder, rows, {})), self.table)

    def _draw(self, rows: list[Row]) -> None:
        """Add the validation metrics of these rows to the curves over steps."""
        for row in rows:
            if row["split"] != "train":
                self.curves.scalars(
                    {f"{row['split']}/{name}": row[name] for name in self._names()}, row["step"]
                )

    def _draw_over_images(self, rows: list[Row]) -> None:
        """Add the metrics of these rows to the curves over training images, which runs of any batch size share."""
        for row in rows:
            values = {f"over_images/{row['split']}_{name}": row[name] for name in self._names()}
            self.curves.scalars(values, self._images(row))

    def _images(self, row: Row) -> int:
        """The number of training images that the network has seen before a row."""
        return row["epoch"] * self.training.run.plan.train_size

    def _names(self) -> list[str]:
        """The metrics of the task."""
        return list(self.training.learner.task.scales)

    def saved(self) -> None:
        """Write the new rows of the checkpoint, and retry earlier writes that failed."""
        self.validated()
        self.metrics.add(b"")
        self.curves.retry()

    def end(self) -> None:
        """Retry earlier writes that failed."""
        self.saved()
