"""The records of a run as other programs read them: metrics.jsonl and config.json. This module does not load torch."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lars.errors import UsageError

METRICS, DESCRIPTION = "metrics.jsonl", "config.json"

# One line of metrics.jsonl.
Row = dict[str, Any]


def encoded(row: Row) -> bytes:
    """Encode a row as a line of JSON. NaN and infinity become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return (json.dumps(finite) + "\n").encode()


def logged_rows(path: Path) -> list[Row]:
    """The rows of metrics.jsonl up to the first incomplete line. Empty if the file does not exist."""
    rows = []
    try:
        for line in path.read_bytes().splitlines(keepends=True):
            row = json.loads(line)
            if not line.endswith(b"\n") or not isinstance(row, dict):
                break
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
    except (OSError, ValueError):
        return rows
    return rows


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds about its run. The run may still be training.

    Attributes:
        folder: The run folder.
        rows: The complete lines of metrics.jsonl, in order.
        description: The content of config.json. Empty if it is missing.
    """

    folder: Path
    rows: list[Row]
    description: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read the records in a run folder."""
        try:
            description = json.loads((folder / DESCRIPTION).read_bytes())
        except (OSError, ValueError):
            description = {}
        rows = logged_rows(folder / METRICS)
        return cls(folder, rows, description if isinstance(description, dict) else {})

    @property
    def flags(self) -> dict[str, Any]:
        """The flags of the run."""
        return self.description.get("flags", {})

    @property
    def plan(self) -> dict[str, Any]:
        """The plan of the run; see `lars.config.plan.Plan`."""
        return self.description.get("plan", {})

    def split(self, name: str) -> list[Row]:
        """The rows of a split: "train", "val", or "val_ema" for the moving average."""
        return [row for row in self.rows if row.get("split") == name]

    @property
    def splits(self) -> list[str]:
        """The splits of the run in the order of their first rows."""
        return list(dict.fromkeys(row["split"] for row in self.rows if "split" in row))

    def training_seconds(self, epoch: int) -> float:
        """Time spent in the training steps of the first `epoch` epochs, in seconds.

        It includes the wait for data, but not validation, checkpoints, start-up, or steps that were lost because a job
        ended before it saved them.
        """
        return sum(row["seconds"] for row in self.split("train") if row["epoch"] <= epoch)


def runs_parser(prog: str, description: str | None, epilog: str) -> argparse.ArgumentParser:
    """A parser for a program that reads runs. Its argument `runs` is for `read_runs`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run folder, or a folder of run folders such as --log-dir of the trainer; the runs may be in progress",
    )
    return parser


def read_runs(paths: Iterable[Path]) -> list[RunRecord]:
    """Read runs. A path is a run folder, or a folder with run folders one or two levels below it.

    Raises:
        UsageError: A path holds no run.
    """
    found = (folder for path in paths for folder in _run_folders(path))
    return [RunRecord.read(folder) for folder in dict.fromkeys(found)]


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise UsageError(f"{path} {what}; name a run folder, or a folder of run folders")
    for pattern in ("", "*/", "*/*/"):
        files = [*path.glob(f"{pattern}{METRICS}"), *path.glob(f"{pattern}{DESCRIPTION}")]
        folders = sorted({file.parent for file in files if _is_record(file)})
        if folders:
            return folders
    raise UsageError(
        f"{path} holds no run: there is no {METRICS} in it; name a run folder, or a folder of run folders"
    )


def _is_record(file: Path) -> bool:
    """Whether a file is one of a run. Other programs have a config.json too."""
    return (
        file.name == METRICS or {"flags", "plan"} <= RunRecord.read(file.parent).description.keys()
    )
