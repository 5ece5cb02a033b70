"""The epochs of a run as a table, one row each, for people and other programs. This module does not load torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lars.run.files import atomic_write
from lars.run.records import RunRecord

# The names of splits and metrics in the tables for other programs. Other metrics keep their names.
_SPLITS = {"train": "train", "val": "test", "val_ema": "test_ema"}
_METRICS = {"top1": "acc"}
_TIMES = ("images_per_second", "data_seconds", "exchange_seconds")
NOT_METRICS = ("split", "epoch", "step", "lr", "seconds", *_TIMES)


def epochs_table(run: RunRecord) -> list[dict[str, Any]]:
    """One row for each epoch, with the results of all splits side by side.

    The columns are run, epoch, step, train_loss, train_acc, test_loss, test_acc (the validation images), the same for
    other metrics and for the moving average (test_ema_...), lr (of the last step), images_per_second, data_seconds and
    exchange_seconds (of the training in this epoch) and training_seconds (since the start of the run). Accuracies are
    in percent.
    """
    table: dict[int, dict[str, Any]] = {}
    for row in run.rows:
        line = table.setdefault(row["epoch"], {"run": str(run.folder), "epoch": row["epoch"]})
        line |= {"step": row["step"], "lr": row["lr"]}
        line |= {
            f"{_SPLITS.get(row['split'], row['split'])}_{_METRICS.get(name, name)}": value
            for name, value in row.items()
            if name not in NOT_METRICS
        }
        if row["split"] == "train":
            line |= {name: row[name] for name in _TIMES if name in row}
            line["training_seconds"] = round(run.training_seconds(row["epoch"]), 3)
    return list(table.values())


def columns(table: Sequence[dict[str, Any]]) -> list[str]:
    """The columns of a table, the most important ones first."""
    first = ["run", "epoch", "step", "train_loss", "train_acc", "test_loss", "test_acc"]
    last = ["lr", *_TIMES, "training_seconds"]
    found = list(dict.fromkeys(name for line in table for name in line))
    middle = [name for name in found if name not in (*first, *last)]
    return [name for name in (*first, *middle, *last) if name in found]


def write_csv(table: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a table as a CSV file. The file appears when it is complete."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(table), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def write_parquet(table: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a table as a parquet file. The file appears when it is complete."""
    import pyarrow
    import pyarrow.parquet

    names = columns(table)
    arrays = [pyarrow.array([line.get(name) for line in table]) for name in names]
    with atomic_write(path) as file:
        pyarrow.parquet.write_table(pyarrow.table(arrays, names=names), file)
