#!/usr/bin/env python
"""TVLARS over its rate and its lambda at batch size 512, beside LARS and LAMB with and without warm-up.

python experiments/tvlars_grid.py --preset digits
python experiments/tvlars_grid.py --preset mnist -- --data-dir DIR
python experiments/tvlars_grid.py --preset cifar10 --ranks 4 -- --archive FILE
cifar10 is the experiment of KhoiDOO/tvlars. The small presets train the same grid for fewer steps.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import report
from experiments.cells import Cell, Result, Study
from experiments.sweep import run_study
from experiments.tuning import Flags, small

RATES = (1.0, 2.0, 3.0)
LAMBDAS = ("1e-6", "1e-5", "1e-4", "1e-3", "5e-3", "1e-2")


@dataclass(frozen=True)
class Grid(Study):
    """TVLARS with every rate and lambda, and the optimizers beside it.

    Attributes:
        title: Title of the table.
        flags: The common flags.
        schedules: Flags of LARS and LAMB: with and without warm-up.
        seeds: Every cell is trained with each of them.
        lamb_rates: Rates of LAMB, in the columns of `RATES`.
        lambdas: The values of lambda.
    """

    title: str
    flags: Flags
    schedules: tuple[Flags, Flags]
    seeds: tuple[int, ...]
    lamb_rates: tuple[float, ...] = (0.01, 0.02, 0.03)
    lambdas: tuple[str, ...] = LAMBDAS

    def rows(self) -> dict[str, tuple[Flags, tuple[float, ...]]]:
        """The flags and the rates of each row."""
        tvlars = {
            f"TVLARS, lambda {value}": (("--base-op", "tvlars", "--lmbda", value), RATES)
            for value in self.lambdas
        }
        others = {
            f"{name.upper()}, {which} warm-up": (("--base-op", name, *schedule), rates)
            for name, rates in (("lars", RATES), ("lamb", self.lamb_rates))
            for which, schedule in zip(("with", "without"), self.schedules, strict=True)
        }
        return tvlars | others

    def cell(self, row: str, rate: float, seed: int) -> Cell:
        """The cell of a row, a rate and a seed."""
        flags = (*self.flags, *self.rows()[row][0], "--base-lr", f"{rate:g}", "--seed", str(seed))
        name = f"{report.slug(row)}_lr{rate:g}_seed{seed}"
        return Cell(name, flags, {"row": row, "lr": rate, "seed": seed})

    def cells(self, results: Mapping[str, Result]) -> list[Cell]:
        """All cells, one seed after the other."""
        rates = {row: rates for row, (_, rates) in self.rows().items()}
        return [self.cell(row, x, seed) for seed in self.seeds for row in rates for x in rates[row]]

    def report(self, results: Mapping[str, Result], out: Path, command: str) -> None:
        """Write the table, the CSV and a figure of the grid."""
        cells = {row: [[self.cell(row, rate, seed).name for seed in self.seeds] for rate in rates]
                 for row, (_, rates) in self.rows().items()}  # fmt: skip
        values = {row: [[results[name].last for name in names if name in results] for names in line]
                  for row, line in cells.items()}  # fmt: skip
        names = [f"lr {x:g} (LAMB: {y:g})" for x, y in zip(RATES, self.lamb_rates, strict=True)]
        report.write_grid(out, self.title, command, names, values, list(results.values()))


def small_grid(dataset: str, epochs: int, seeds: tuple[int, ...]) -> Grid:
    """The grid on a small data set, with a warm-up of a tenth, and two larger lambdas: it has few steps."""
    schedules = [("--warmup-epochs", f"{x * epochs:g}", "--lr-power", "2") for x in (0.1, 0)]
    title = f"TVLARS, {dataset}, small network, batch size 512, {epochs} epochs"
    common = (title, small(dataset, epochs, 512), (schedules[0], schedules[1]), seeds)
    return Grid(*common, lambdas=(*LAMBDAS, "3e-2", "1e-1"))


PRESETS = {
    **{name: small_grid(name, epochs, (0,)) for name, epochs in (("digits", 30), ("mnist", 3))},
    "cifar10": Grid(
        "TVLARS, CIFAR-10, ResNet-18, batch size 512, 100 epochs",
        ("--dataset", "cifar10", "--model", "resnet18", "--small-stem", "--rotation", "15",
         "--weight-init", "xavier_uniform", "--epochs", "100", "--batch-size", "128",
         "--effective-batch-size", "512", "--wd", "5e-4", "--label-smoothing", "0"),
        (("--lr-schedule", "lars-warm"), ("--lr-schedule", "none")), (0,), (1.0, 2.0, 3.0),
    ),
}  # fmt: skip

if __name__ == "__main__":
    run_study(PRESETS, __doc__)
