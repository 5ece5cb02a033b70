#!/usr/bin/env python
"""The published forms of LARS side by side at a large batch size, with and without one outlier among the gradients.

python experiments/lars_forms.py --preset digits
python experiments/lars_forms.py --preset mnist -- --data-dir DIR

The rate of every form is tuned without an outlier. Then the same settings are trained again, and the gradient of one
step is 100 times as large as it is. The step is halfway through the training.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import report
from experiments.cells import Cell, Result, Study
from experiments.sweep import run_study
from experiments.tuning import AROUND, Ladder, Line, small

# The rate in the middle of the grid of each form.
RATES = {"nus": 4.0, "mlperf": 4.0, "torchlars": 4.0, "barlowtwins": 4.0, "larc": 0.2}
CLIPPED = "nus, clipped"


@dataclass(frozen=True)
class Forms(Study):
    """Every form at one batch size, tuned, and then trained with an outlier as well."""

    tuning: Ladder
    steps: int

    def pairs(self, results: Mapping[str, Result]) -> dict[str, list[tuple[Cell, Cell]]]:
        """The cells of the chosen setting of each form: without and with the outlier, for each seed."""
        pairs = {}
        for tuned in self.tuning.all_tuned(results):
            if tuned.best is not None:
                clean = [tuned.best, *self.tuning.with_other_seeds(tuned)]
                pairs[tuned.line.name] = [(cell, self.with_outlier(cell)) for cell in clean]
        return pairs

    def with_outlier(self, cell: Cell) -> Cell:
        """The same training with an outlier halfway."""
        flags = (*cell.flags, "--outlier-step", str(self.steps // 2))
        labels = {**cell.labels, "outlier": True}
        return Cell(f"{cell.name}_outlier", flags, labels, "experiments/train_with_outlier.py")

    def cells(self, results: Mapping[str, Result]) -> list[Cell]:
        """The cells that tune, and then the pairs."""
        outliers = [other for pairs in self.pairs(results).values() for _, other in pairs]
        return self.tuning.cells(results) + outliers

    def still_unknown(self, results: Mapping[str, Result]) -> int:
        """The number of cells whose setting is not chosen yet."""
        waiting = len(self.tuning.lines) - len(self.pairs(results))
        return self.tuning.still_unknown(results) + waiting * len(self.tuning.seeds)

    def report(self, results: Mapping[str, Result], out: Path, command: str) -> None:
        """Write the table, the CSV and a figure."""
        values = {
            f"{form} (lr {pairs[0][0].labels['lr']:g})": [
                [results[pair[k].name].last for pair in pairs if pair[k].name in results]
                for k in (0, 1)
            ]
            for form, pairs in self.pairs(results).items()
        }
        columns = ["without an outlier", "with one outlier"]
        report.write_grid(out, self.tuning.title, command, columns, values, list(results.values()))


def forms(dataset: str, epochs: int, train_size: int, batch: int, seeds: tuple[int, ...]) -> Forms:
    """The study on one data set."""
    common = ("--base-op", "lars", "--lr-power", "2", "--wd", "1e-4",
              "--warmup-epochs", f"{0.1 * epochs:g}")  # fmt: skip

    def line(name: str, form: str, *more: str) -> Line:
        rates = [x * RATES[form] for x in AROUND]
        return Line(name, (*common, "--lars-form", form, *more), lambda batch: rates)

    lines = [line(form, form) for form in RATES]
    lines.append(line(CLIPPED, "nus", "--clip-grad-norm", "1"))

    title = f"Forms of LARS, {dataset}, small network, batch size {batch}, {epochs} epochs"
    steps = epochs * math.ceil(train_size / batch)
    return Forms(
        Ladder(title, tuple(lines), (batch,), partial(small, dataset, epochs), seeds), steps
    )


PRESETS = {
    "digits": forms("digits", 10, 1437, 1024, (0, 1, 2)),
    "mnist": forms("mnist", 2, 60_000, 4096, (0, 1)),
}

if __name__ == "__main__":
    run_study(PRESETS, __doc__)
