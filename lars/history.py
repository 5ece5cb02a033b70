"""Show how the accuracy of runs improved, and how much training that took."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lars.errors import UsageError
from lars.run.epochs import NOT_METRICS, columns, epochs_table, write_csv, write_parquet
from lars.run.records import Row, RunRecord, read_runs, runs_parser

EXAMPLES = """\
examples:
  each improvement of the validation top-1 of a run:
    python -m lars.history logs/imagenet/RUN
  every epoch of all runs in a folder, also as a table for other programs:
    python -m lars.history logs/imagenet --all --csv epochs.csv
"""


def validations(run: RunRecord, metric: str = "top1") -> list[Row]:
    """The rows of all validations that have a metric, in order. Those of the moving average are among them."""
    return [row for row in run.rows if row.get("split") != "train" and metric in row]


def improvements(run: RunRecord, metric: str = "top1") -> list[Row]:
    """The validations that were better than all before them. The last one is the best of the run."""
    found: list[Row] = []
    for row in validations(run, metric):
        if row[metric] == row[metric] and (not found or row[metric] > found[-1][metric]):
            found.append(row)
    return found


def report(run: RunRecord, *, every_epoch: bool = False) -> str:
    """The history of a run as text: its improvements or all its epochs, and a summary."""
    return "\n".join(
        [str(run.folder), *(_epochs(run) if every_epoch else _improvements(run)), *_summary(run)]
    )


def _improvements(run: RunRecord) -> list[str]:
    rows = improvements(run)
    names = ["epoch", "step", "top-1 %", "training s"]
    cells = [
        [
            row["epoch"],
            row["step"],
            f"{row['top1']:.2f}",
            f"{run.training_seconds(row['epoch']):.1f}",
        ]
        for row in rows
    ]
    if any(row["split"] != "val" for row in rows):
        names.append("of")
        cells = [[*line, row["split"]] for line, row in zip(cells, rows, strict=True)]
    return _aligned(names, cells) if rows else []


def _epochs(run: RunRecord) -> list[str]:
    table = epochs_table(run)
    names = [name for name in columns(table) if name != "run"]
    return _aligned(names, [[_short(line.get(name)) for name in names] for line in table])


def _summary(run: RunRecord) -> list[str]:
    rows, better = validations(run), improvements(run)
    training = sum(row["seconds"] for row in run.split("train"))
    validating = sum(row["seconds"] for row in run.rows if row["split"] != "train")
    epochs = max((row["epoch"] for row in run.rows), default=0)
    planned = run.flags.get("epochs")
    lines = []
    if better:
        last = [row for row in rows if row["split"] == "val"][-1]
        lines.append(
            f"  best top-1 {better[-1]['top1']:.2f} % (epoch {better[-1]['epoch']}), "
            f"last {last['top1']:.2f} % (epoch {last['epoch']})"
        )
    elif run.rows:
        found = ", ".join(name for name in run.rows[-1] if name not in NOT_METRICS)
        lines.append(f"  no validation has a top-1 yet; the last row has {found}")
    of_all = f" of {planned}" if planned else ""
    lines.append(
        f"  {epochs}{of_all} epochs; {_hours(training)} of training, {_hours(validating)} of validation"
    )
    return lines


def _hours(seconds: float) -> str:
    return f"{seconds:.1f} s ({seconds / 3600:.3g} h)"


def _short(value: Any) -> str:
    """A value with at most six digits. Empty if there is none."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _aligned(names: Sequence[str], cells: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a table whose columns are aligned to the right."""
    table = [list(names), *([str(cell) for cell in line] for line in cells)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in table
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, print the history and write the files."""
    parser = runs_parser("python -m lars.history", __doc__, EXAMPLES)
    parser.add_argument(
        "--all", action="store_true", help="show every epoch, not only the improvements"
    )
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="also write every epoch of all runs as CSV"
    )
    parser.add_argument(
        "--parquet", type=Path, metavar="FILE", help="the same as a parquet file, with pyarrow"
    )
    options = parser.parse_args(argv)
    try:
        runs = read_runs(options.runs)
    except UsageError as error:
        parser.error(str(error))
    print("\n\n".join(report(run, every_epoch=options.all) for run in runs))
    table = [line for run in runs for line in epochs_table(run)]
    for flag, path, write in (
        ("--csv", options.csv, write_csv),
        ("--parquet", options.parquet, write_parquet),
    ):
        try:
            if path is not None:
                write(table, path)
        except ImportError as error:
            parser.error(f"{flag} needs pyarrow ({error}); run ./launch/setup.sh, or use --csv")
        except OSError as error:
            parser.error(f"{flag} {path} cannot be written: {error.strerror or error}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends the program silently
    main()
