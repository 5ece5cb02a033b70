"""A study of optimizers over batch sizes, in which every optimizer gets the same tuning budget.

For every batch size, the tuning seed tries a few learning rates. While the best one is at the edge of the grid, the
grid grows by one rate, up to a limit. Then the best rate is tried with each further option, such as a longer warm-up.
The best setting is trained with the other seeds. Settings are compared by their last validation top-1.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import report
from experiments.cells import Cell, Result, Study

Flags = tuple[str, ...]

# Factors of the rates that are tried first.
AROUND = (0.5, 1.0, 2.0)


def small(dataset: str, epochs: int, batch: int) -> Flags:
    """The common flags of the tuned studies. Batches above 256 are accumulated; the network has no BatchNorm."""
    return ("--dataset", dataset, "--model", "small_cnn_bn", "--weight-init", "kaiming_uniform", "--padding", "2",
            "--epochs", str(epochs), "--batch-size", str(min(batch, 256)), "--effective-batch-size", str(batch),
            "--val-batch-size", "500", "--label-smoothing", "0")  # fmt: skip


@dataclass(frozen=True)
class Line:
    """An optimizer of a study: one line of the figure.

    Attributes:
        name: Name, from which the names of the cells are made.
        flags: Flags that choose the optimizer.
        rates: The learning rates to try at a batch size, ascending. A single rate is not tuned, and without a rate
            the optimizer is not trained at that batch size.
        options: Further flags to try at a batch size with the best rate. The first is used to tune the rate.
        remark: Words that follow the name in tables and in the legend.
    """

    name: str
    flags: Flags
    rates: Callable[[int], Sequence[float]]
    options: Callable[[int], Sequence[Flags]] = lambda batch: ((),)
    remark: str = ""

    @property
    def label(self) -> str:
        """The name in tables and in the legend."""
        return f"{self.name}, {self.remark}" if self.remark else self.name


def grid(
    base_lr: float, base_batch: int, rule: str, around: Sequence[float]
) -> Callable[[int], list[float]]:
    """The rates to try at a batch size: a rule of scaling, times each factor in `around`.

    Args:
        base_lr: Rate at `base_batch`.
        base_batch: Batch size for which `base_lr` is right.
        rule: keep, linear or sqrt; see `lars.schedules.scale_lr`.
        around: Ascending factors, such as (0.5, 1, 2).
    """

    def rates(batch: int) -> list[float]:
        from lars.schedules import scale_lr  # loads torch

        return [x * scale_lr(base_lr, factor=batch / base_batch, rule=rule) for x in around]

    return rates


@dataclass(frozen=True)
class Tuned:
    """What is known about one optimizer at one batch size.

    Attributes:
        line: The optimizer.
        batch: The effective batch size.
        cells: The cells of the tuning seed so far, in the order in which they were chosen.
        best: The best of these cells; None while one of them has no result.
        at_edge: Whether the best rate is the lowest or the highest of several that were tried.
    """

    line: Line
    batch: int
    cells: list[Cell]
    best: Cell | None = None
    at_edge: bool = False


@dataclass(frozen=True)
class Ladder(Study):
    """A study over batch sizes.

    Attributes:
        title: Title of the figure.
        lines: The optimizers.
        batches: Effective batch sizes, in the order in which they are trained.
        flags: The common flags at a batch size.
        seeds: The first one tunes; the best setting is trained with all of them.
        chance: Top-1 of random guesses, in percent. A training run that diverged counts as this.
        extensions: How many rates the grid may grow by.
        script: The script that trains a cell.
        published: Published results that the figure shows beside: name -> (batch size -> top-1 in percent).
    """

    title: str
    lines: tuple[Line, ...]
    batches: tuple[int, ...]
    flags: Callable[[int], Flags]
    seeds: tuple[int, ...]
    chance: float = 10.0
    extensions: int = 2
    script: str = "experiments/train_small.py"
    published: Mapping[str, Mapping[int, float]] | None = None

    def cell(self, line: Line, batch: int, rate: float, option: int, seed: int) -> Cell:
        """The cell of one setting and seed."""
        more = line.options(batch)[option]
        name = (
            f"{report.slug(line.name)}_b{batch}_lr{rate:.4g}"
            + (f"_option{option}" if option else "")
            + f"_seed{seed}"
        )
        flags = (
            *self.flags(batch),
            *line.flags,
            "--base-lr",
            f"{rate:.6g}",
            *more,
            "--seed",
            str(seed),
        )
        labels = {"optimizer": line.name, "batch": batch, "lr": float(f"{rate:.6g}"),
                  "options": " ".join(more), "option": option, "seed": seed}  # fmt: skip
        return Cell(name, flags, labels, self.script)

    def tuned(self, line: Line, batch: int, results: Mapping[str, Result]) -> Tuned:
        """Tune one optimizer at one batch size, as far as the results allow."""
        rates, seed = list(line.rates(batch)), self.seeds[0]
        tries = [self.cell(line, batch, rate, 0, seed) for rate in rates]
        several, limit = len(rates) > 1, len(rates) + self.extensions
        while all(cell.name in results for cell in tries):
            best = max(tries, key=lambda cell: self.top1(results[cell.name]))
            rate = rates[tries.index(best)]
            at_edge = several and rate in (min(rates), max(rates))
            if at_edge and len(rates) < limit:
                rates.append(rate / 2 if rate == min(rates) else rate * 2)
                tries.append(self.cell(line, batch, rates[-1], 0, seed))
                continue
            others = range(1, len(line.options(batch)))
            tries = [*tries, *(self.cell(line, batch, rate, option, seed) for option in others)]
            if all(cell.name in results for cell in tries):
                best = max(tries, key=lambda cell: self.top1(results[cell.name]))
                return Tuned(line, batch, tries, best, at_edge)
            break
        return Tuned(line, batch, tries)

    def top1(self, result: Result) -> float:
        """The last top-1 of a result, in percent. A training run that diverged counts as chance."""
        return self.chance if math.isnan(result.last) else result.last

    def all_tuned(self, results: Mapping[str, Result]) -> list[Tuned]:
        """The state of every optimizer at every batch size."""
        return [self.tuned(line, batch, results) for batch in self.batches
                for line in self.lines if line.rates(batch)]  # fmt: skip

    def with_other_seeds(self, tuned: Tuned) -> list[Cell]:
        """The cells of the best setting with the seeds that did not choose it."""
        if tuned.best is None:
            return []
        labels = tuned.best.labels
        setting = (tuned.line, tuned.batch, labels["lr"], labels["option"])
        return [self.cell(*setting, seed) for seed in self.seeds[1:]]

    def cells(self, results: Mapping[str, Result]) -> list[Cell]:
        """One batch size after the other: first the cells of the tuning seed, then those of the other seeds."""
        cells = []
        for batch in self.batches:
            groups = [group for group in self.all_tuned(results) if group.batch == batch]
            cells += [cell for group in groups for cell in group.cells]
            cells += [cell for group in groups for cell in self.with_other_seeds(group)]
        return cells

    def still_unknown(self, results: Mapping[str, Result]) -> int:
        """The number of cells of the other seeds, whose setting is not chosen yet."""
        waiting = sum(group.best is None for group in self.all_tuned(results))
        return waiting * len(self.seeds[1:])

    def points(self, results: Mapping[str, Result]) -> list[report.Point]:
        """One point per optimizer and batch size whose setting is chosen."""
        points = []
        for group in sorted(self.all_tuned(results), key=lambda group: group.batch):
            if group.best is None:
                continue
            others = [results[c.name] for c in self.with_other_seeds(group) if c.name in results]
            runs = [results[group.best.name], *others]
            values = [self.top1(run) for run in runs]
            points.append(report.Point(
                optimizer=group.line.label, batch=group.batch, steps=runs[0].steps, lr=group.best.labels["lr"],
                options=group.best.labels["options"], tried=len(group.cells), at_edge=group.at_edge,
                tuning_top1=values[0], other_top1=tuple(values[1:]),
                best_top1=statistics.fmean(run.best for run in runs),
                diverged=sum(run.exit_code != 0 for run in runs),
                seconds=statistics.fmean(run.seconds for run in runs),
            ))  # fmt: skip
        return points

    def report(self, results: Mapping[str, Result], out: Path, command: str) -> None:
        """Write table.md, results.csv and figure.png."""
        names = [line.label for line in self.lines]
        report.write_csv(out / "results.csv", results.values())
        report.write_tables(
            out / "table.md", self.title, command, names, self.points(results), self.published or {}
        )
        report.draw(
            out / "figure.png",
            self.title,
            names,
            self.points(results),
            self.published or {},
            self.chance,
        )
