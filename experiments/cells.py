"""The training runs of a study, called cells, and their results.

Importing this loads neither torch nor NumPy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data.sources.imagenet import ImageNet
from experiments import train_small, train_with_outlier
from lars.config import Config, parse
from lars.errors import NonFiniteError, UsageError
from lars.run.files import atomic_write
from lars.run.records import RunRecord

# The scripts that train a cell, each with the function that reads its flags.
SCRIPTS = {
    "experiments/train_small.py": train_small.read_flags,
    "experiments/train_with_outlier.py": train_with_outlier.read_flags,
    "train_imagenet.py": lambda argv: parse(argv, Config, ImageNet, description=""),
}


@dataclass(frozen=True)
class Cell:
    """One training of a study.

    Attributes:
        name: Name of its run folder.
        flags: Flags of the script.
        labels: What the study calls it: its optimizer, batch size, rate, seed, and so on.
        script: The script that trains it, a key of `SCRIPTS`.
    """

    name: str
    flags: tuple[str, ...]
    labels: Mapping[str, Any]
    script: str = "experiments/train_small.py"


@dataclass(frozen=True)
class Result:
    """The result of a cell.

    Attributes:
        name: Name of the cell.
        labels: Labels of the cell.
        settings: All settings that determine the training; see `settings_of`.
        last: Top-1 of the last validation, in percent. It is nan if the training diverged.
        best: The best top-1 of any validation, in percent.
        steps: Optimizer steps.
        seconds: Time of the training without the validations.
        exit_code: Exit code of the script: 0, or 5 if the training diverged.
    """

    name: str
    labels: Mapping[str, Any]
    settings: Mapping[str, Any]
    last: float
    best: float
    steps: int
    seconds: float
    exit_code: int = 0


class Study(Protocol):
    """What a sweep needs to know about a study."""

    def cells(self, results: Mapping[str, Result]) -> list[Cell]:
        """The cells that are known so far, in the order in which to run them.

        Args:
            results: The results so far, by the names of their cells. Later cells may depend on them.
        """
        ...

    def still_unknown(self, results: Mapping[str, Result]) -> int:
        """The number of cells that depend on results that are missing."""
        return 0

    def report(self, results: Mapping[str, Result], out: Path, command: str) -> None:
        """Write tables and a figure to the folder `out`. `command` is the line that makes them."""
        ...


def settings_of(cell: Cell) -> dict[str, Any]:
    """All settings that determine the training of a cell, such as ``{"model": "resnet18", "base_lr": 0.1, ...}``.

    Paths, the number of ranks and the accumulation are not among them. A flag that the script refuses ends the program
    with exit code 2 and the script's own message.
    """
    try:
        parts = SCRIPTS[cell.script](list(cell.flags))
    except SystemExit:
        print(f"cell {cell.name}: {cell.script} refuses these flags: {' '.join(cell.flags)}",
              file=sys.stderr)  # fmt: skip
        raise
    values = {
        field.name: getattr(part, field.name)
        for part in parts
        for field in dataclasses.fields(part)
        if field.metadata.get("same_run", True) or field.name == "max_steps"
    }
    return json.loads(json.dumps(values))  # tuples become lists, as in a result that was read


def settings_changed(
    cell: Cell, settings: Mapping[str, Any], result: Result
) -> dict[str, tuple[Any, Any]]:
    """What differs between a result and the settings of its cell now: name -> (in the result, now).

    A flag that is newer than the result had its default there.
    """
    if settings == result.settings:
        return {}
    which = cell.flags.index("--dataset") if "--dataset" in cell.flags else len(cell.flags)
    defaults = settings_of(dataclasses.replace(cell, flags=cell.flags[which : which + 2]))
    before = defaults | dict(result.settings)
    return {name: (before[name], now) for name, now in settings.items() if before[name] != now}


class Results:
    """The results of a study: one JSON file per cell, which appears when its training has ended."""

    def __init__(self, folder: Path) -> None:
        """Read the results in `folder`.

        Raises:
            UsageError: A file is not a result.
        """
        self.folder = folder
        self.by_name: dict[str, Result] = {}
        for path in sorted(folder.glob("[!.]*.json")):
            try:
                values = json.loads(path.read_text())
                values |= {k: math.nan for k in ("last", "best") if values[k] is None}
                self.by_name[path.stem] = Result(**values)
            except (ValueError, TypeError, KeyError) as error:
                raise UsageError(
                    f"--out: {path} is not a result ({error}); remove it to run its cell again"
                ) from error

    def add(self, result: Result) -> None:
        """Keep a result on disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        values = dataclasses.asdict(result)
        values |= {k: None for k in ("last", "best") if math.isnan(values[k])}
        with atomic_write(self.folder / f"{result.name}.json") as file:
            file.write((json.dumps(values, indent=1) + "\n").encode())
        self.by_name[result.name] = result

    def check(self, cells: Sequence[Cell]) -> None:
        """Check the flags of the cells, and that their results were made with the same settings.

        Raises:
            UsageError: A result was made with other settings than its cell has now.
        """
        for cell in cells:
            settings, result = settings_of(cell), self.by_name.get(cell.name)
            changed = settings_changed(cell, settings, result) if result else {}
            if changed:
                words = ", ".join(
                    f"{k} was {was} and is now {now}" for k, (was, now) in changed.items()
                )
                raise UsageError(
                    f"--out: the result of cell {cell.name} was made with other settings ({words}); choose another "
                    f"folder, or remove {self.folder / cell.name}.json"
                )


def result_of(cell: Cell, run_folder: Path, exit_code: int) -> Result:
    """Read the result of a run that has ended with exit code 0 or 5 from its run folder."""
    record = RunRecord.read(run_folder)
    top1 = [row["top1"] for row in record.split("val") if not math.isnan(row["top1"])]
    finished = exit_code != NonFiniteError.exit_code and top1
    return Result(
        cell.name,
        dict(cell.labels),
        settings_of(cell),
        last=top1[-1] if finished else math.nan,
        best=max(top1, default=math.nan),
        steps=record.rows[-1]["step"] if record.rows else 0,
        seconds=round(sum(row["seconds"] for row in record.split("train")), 2),
        exit_code=exit_code,
    )
