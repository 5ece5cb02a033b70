#!/usr/bin/env python
"""TVLARS over its rate and its lambda at batch size 512, beside LARS and LAMB with and without warm-up.

python experiments/tvlars_grid.py --preset digits
python experiments/tvlars_grid.py --preset mnist -- --data-dir DIR
python experiments/tvlars_grid.py --preset cifar10 --ranks 4 -- --archive cifar-10-python.tar.gz

cifar10 is the experiment of KhoiDOO/tvlars: ResNet-18, 100 epochs, rates 1, 2 and 3, lambda from 1e-6 to 1e-2. The
small presets train the same grid for fewer steps.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import report
from experiments.cells import Cell, Result
from experiments.sweep import run_study
from experiments.tuning import Flags, small

RATES = (1.0, 2.0, 3.0)
LAMBDAS = ("1e-6", "1e-5", "1e-4", "1e-3", "5e-3", "1e-2")


@dataclass(frozen=True)
class Grid:
    """The rows of the table, each for all rates: TVLARS with every lambda, and the optimizers beside it.

    Attributes:
        title: Title of the table and the figure.
        flags: The common flags.
        warm_up: Epochs of warm-up of LARS and LAMB where they have one.
        seeds: Every cell is trained with each of them.
        lamb_rates: Rates of LAMB, which needs smaller ones; the i-th belongs to the i-th rate.
    """

    title: str
    flags: Flags
    warm_up: float
    seeds: tuple[int, ...]
    lamb_rates: tuple[float, ...] = (0.01, 0.02, 0.03)

    def rows(self) -> dict[str, tuple[Flags, tuple[float, ...]]]:
        """The flags and the rates of each row."""
        tvlars = {
            f"TVLARS, lambda {value}": (("--base-op", "tvlars", "--lmbda", value), RATES)
            for value in LAMBDAS
        }
        others = {
            f"{name.upper()}, {warm_up}": (("--base-op", name, "--warmup-epochs", epochs), rates)
            for name, rates in (("lars", RATES), ("lamb", self.lamb_rates))
            for warm_up, epochs in (("with warm-up", f"{self.warm_up:g}"), ("without warm-up", "0"))
        }
        return tvlars | others

    def cell(self, row: str, rate: float, seed: int) -> Cell:
        """The cell of a row, a rate and a seed."""
        name = f"{report.slug(row)}_lr{rate:g}_seed{seed}"
        flags = (*self.flags, *self.rows()[row][0], "--base-lr", f"{rate:g}", "--seed", str(seed))
        return Cell(name, flags, {"row": row, "lr": rate, "seed": seed})

    def cells(self, results: Mapping[str, Result]) -> list[Cell]:
        """All cells, one seed after the other."""
        return [self.cell(row, rate, seed) for seed in self.seeds
                for row, (_, rates) in self.rows().items() for rate in rates]  # fmt: skip

    def still_unknown(self, results: Mapping[str, Result]) -> int:
        """No cell depends on a result."""
        return 0

    def report(self, results: Mapping[str, Result], out: Path, command: str) -> None:
        """Write the table, the CSV and a figure of the grid."""
        values = {
            row: [[results[cell.name].last for seed in self.seeds
                   if (cell := self.cell(row, rate, seed)).name in results] for rate in rates]
            for row, (_, rates) in self.rows().items()
        }  # fmt: skip
        columns = [
            f"lr {r:g} (LAMB: {lamb:g})" for r, lamb in zip(RATES, self.lamb_rates, strict=True)
        ]
        report.write_grid(out, self.title, command, columns, values, list(results.values()))


PRESETS = {
    "digits": Grid("TVLARS, digits, small network, batch size 512, 50 epochs", small("digits", 50, 512), 5, (0, 1)),
    "mnist": Grid("TVLARS, MNIST, small network, batch size 512, 3 epochs", small("mnist", 3, 512), 0.3, (0,)),
    "cifar10": Grid(
        "TVLARS, CIFAR-10, ResNet-18, batch size 512, 100 epochs",
        ("--dataset", "cifar10", "--model", "resnet18", "--rotation", "15", "--weight-init", "xavier_uniform",
         "--epochs", "100", "--batch-size", "128", "--effective-batch-size", "512", "--wd", "5e-4",
         "--label-smoothing", "0"),
        20, (0,), (1.0, 2.0, 3.0),
    ),
}  # fmt: skip

if __name__ == "__main__":
    run_study(PRESETS, __doc__)
