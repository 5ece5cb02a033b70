"""Tables and figures of a study."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.cells import Result
from lars.run.files import atomic_write

# Accuracies that may be labelled on an axis, in percent.
TICKS = (20, 40, 60, 70, 74, 77, 80, 85, 90, 93, 95, 96, 97, 98, 98.5, 99, 99.2, 99.4, 99.6, 99.8)


@dataclass(frozen=True)
class Point:
    """An optimizer with its best setting at one batch size. All top-1 are in percent.

    Attributes:
        optimizer: Name of the optimizer.
        batch: Effective batch size.
        steps: Optimizer steps of a run.
        lr: The rate that was chosen.
        options: Further flags that were chosen.
        tried: Number of settings that the tuning seed tried.
        at_edge: Whether the rate is at the edge of the rates that were tried.
        tuning_top1: Last top-1 of the tuning seed, which chose the setting and is therefore too high on average.
        other_top1: Last top-1 of each of the other seeds.
        best_top1: Best top-1 of any epoch, as a mean over the seeds.
        diverged: Number of training runs that diverged.
        seconds: Time of a run without validation, as a mean over the seeds.
    """

    optimizer: str
    batch: int
    steps: int
    lr: float
    options: str
    tried: int
    at_edge: bool
    tuning_top1: float
    other_top1: tuple[float, ...]
    best_top1: float
    diverged: int
    seconds: float

    @property
    def all_top1(self) -> tuple[float, ...]:
        """Last top-1 of every seed."""
        return (self.tuning_top1, *self.other_top1)

    @property
    def mean(self) -> float:
        """Mean of the last top-1 over all seeds."""
        return statistics.fmean(self.all_top1)

    @property
    def spread(self) -> str:
        """The mean and the standard deviation over the seeds."""
        deviation = f" ± {statistics.stdev(self.all_top1):.2f}" if self.other_top1 else ""
        return f"{self.mean:.2f}{deviation}"


def write_text(path: Path, text: str) -> None:
    """Write a file that is either complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())


def slug(name: str) -> str:
    """A name in lower case that is fit for files: ``LARS (NUS)`` -> ``lars-nus``."""
    return re.sub(r"[^\w.]+", "-", name.lower()).strip("-")


def write_csv(path: Path, results: Collection[Result]) -> None:
    """Write one row per cell: its labels and its result."""
    labels = list(dict.fromkeys(name for result in results for name in result.labels))
    measured = ("last", "best", "steps", "seconds", "exit_code")
    text = io.StringIO()
    rows = csv.DictWriter(text, ["cell", *labels, *measured], lineterminator="\n")
    rows.writeheader()
    for result in results:
        values = {name: getattr(result, name) for name in measured}
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        rows.writerow({"cell": result.name, **result.labels, **rounded})
    write_text(path, text.getvalue())


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def write_tables(
    path: Path, title: str, command: str, names: Sequence[str], points: Sequence[Point],
    published: Mapping[str, Mapping[int, float]],
) -> None:  # fmt: skip
    """Write the accuracies, the tuned settings and the published values as Markdown."""
    found = {(point.optimizer, point.batch): point for point in points}
    batches = sorted({point.batch for point in points})
    shown = [name for name in names if any(point.optimizer == name for point in points)]
    spread = [
        [batch, *(found[name, batch].spread if (name, batch) in found else "" for name in shown)]
        for batch in batches
    ]
    settings = [
        [p.optimizer, p.batch, p.steps, f"{p.lr:.4g}", f"`{p.options}`" if p.options else "", p.tried,
         "yes" if p.at_edge else "", f"{p.tuning_top1:.2f}",
         f"{statistics.fmean(p.other_top1):.2f}" if p.other_top1 else "", f"{p.best_top1:.2f}",
         p.diverged or "", f"{p.seconds:.0f}"]
        for name in shown for p in points if p.optimizer == name
    ]  # fmt: skip
    text = f"# {title}\n\n`{command}`\n"
    if points:
        text += "\nLast validation top-1 in percent, mean ± standard deviation over all seeds.\n\n"
        text += table(["batch size", *shown], spread)
        text += "\nThe settings that the tuning seed chose.\n\n" + table(
            ["optimizer", "batch size", "steps", "lr", "options", "settings tried", "rate at the edge",
             "top-1 of the tuning seed", "mean of the other seeds", "best of any epoch", "diverged", "seconds"],
            settings,
        )  # fmt: skip
    if published:
        sizes = sorted({batch for values in published.values() for batch in values})
        rows = [[batch, *(f"{v[batch]:.2f}" if batch in v else "" for v in published.values())]
                for batch in sizes]  # fmt: skip
        text += "\nPublished top-1 in percent, not measured here.\n\n"
        text += table(["batch size", *published], rows)
    write_text(path, text)


def write_grid(
    out: Path, title: str, command: str, columns: Sequence[str],
    values: Mapping[str, Sequence[Sequence[float]]], results: Collection[Result],
) -> None:  # fmt: skip
    """Write table.md, results.csv and figure.png of a grid.

    Args:
        out: The folder to write to.
        title: Title of the table and the figure.
        command: The line that makes them.
        columns: Names of the columns.
        values: The last top-1 of every seed, in percent: row -> column -> seed. nan: the run diverged.
        results: All results, for the CSV.
    """
    write_csv(out / "results.csv", results)
    rows = [[row, *(_cell_text(seeds) for seeds in cells)] for row, cells in values.items()]
    text = f"# {title}\n\n`{command}`\n\nLast validation top-1 in percent of each seed.\n\n"
    write_text(out / "table.md", text + table(["", *columns], rows))
    if any(seeds for cells in values.values() for seeds in cells):
        _draw_grid(out / "figure.png", title, columns, values)


def _draw_grid(
    path: Path, title: str, columns: Sequence[str], values: Mapping[str, Sequence[Sequence[float]]]
) -> None:
    from lars.figures import figure, save, style

    means = [
        [statistics.fmean(seeds) if seeds else math.nan for seeds in cells]
        for cells in values.values()
    ]
    with style():
        drawn, (axes,) = figure()
        drawn.set_size_inches(1.2 * len(columns) + 2.2, 0.24 * len(values) + 0.9)
        axes.imshow(means, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        axes.grid(visible=False)
        for y, row in enumerate(values.values()):
            for x, seeds in enumerate(row):
                colour = "white" if means[y][x] <= 50 else "black"
                axes.text(x, y, mean_text(seeds), ha="center", va="center", color=colour)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(values)), list(values))
        heading = f"{title}\nvalidation top-1 (%), mean over the seeds"
        drawn.suptitle(heading, x=0.01, ha="left", fontsize=8)
    save(drawn, path)


def mean_text(seeds: Sequence[float]) -> str:
    """The mean of the seeds, or how many of them diverged. Empty if none has been trained."""
    diverged = sum(math.isnan(top1) for top1 in seeds)
    if diverged:
        return f"{diverged} of {len(seeds)} diverged"
    return f"{statistics.fmean(seeds):.1f}" if seeds else ""


def _cell_text(seeds: Sequence[float]) -> str:
    return ", ".join("diverged" if math.isnan(top1) else f"{top1:.2f}" for top1 in seeds)


def draw(
    path: Path, title: str, names: Sequence[str], points: Sequence[Point],
    published: Mapping[str, Mapping[int, float]], chance: float,
) -> None:  # fmt: skip
    """Draw the accuracy over the batch size, with the range over the seeds. Published values are dashed."""
    from lars.figures import figure, look, save, style

    values = [top1 for p in points for top1 in p.all_top1]
    values += [top1 for line in published.values() for top1 in line.values()]
    if not values:
        return
    with style():
        drawn, (axes,) = figure()
        drawn.set_size_inches(5.4, 3.4)
        for number, name in enumerate(names):
            mine = [point for point in points if point.optimizer == name]
            low = [p.mean - min(p.all_top1) for p in mine]
            high = [max(p.all_top1) - p.mean for p in mine]
            if mine:
                axes.errorbar([p.batch for p in mine], [p.mean for p in mine], yerr=[low, high],
                              label=name, capsize=2, **look(number))  # fmt: skip
        for number, (name, line) in enumerate(published.items()):
            dashed = {**look(number), "linestyle": "--", "markerfacecolor": "white"}
            axes.plot(list(line), list(line.values()), label=f"{name}, published", **dashed)
        batches = {p.batch for p in points} | {b for line in published.values() for b in line}
        _label(axes, sorted(batches), values, chance)
        axes.set_title(title, fontsize=8, loc="left")
    save(drawn, path)


def _label(axes: Any, batches: Sequence[int], values: Sequence[float], chance: float) -> None:
    """Set the scales, ticks and labels. The vertical scale is logarithmic in the error, 100 - top-1."""
    axes.set_yscale("function", functions=(_stretched, _unstretched))
    low, high = _stretched([min(values), max(values)])
    margin = 0.05 * (high - low) + 0.01
    heights = []
    for tick in (
        *reversed(TICKS),
        chance,
    ):  # from above, without those that are too close to the last one
        height = float(_stretched(tick))
        if low - margin <= height <= high + margin and all(
            last - height > margin for last in heights
        ):
            heights.append(height)
    axes.set_yticks([float(_unstretched(height)) for height in heights])
    axes.set_yticklabels([f"{_unstretched(height):.3g}" for height in heights])
    if low - margin <= _stretched(chance):
        axes.axhline(chance, color="#666666", linestyle=":", linewidth=1, zorder=1, label="chance")
    axes.set_ylim(*_unstretched([low - margin, high + margin]))
    axes.set_ylabel("validation top-1 (%)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.minorticks_off()
    axes.set_xlabel("effective batch size")
    axes.legend(loc="lower left", frameon=True, framealpha=1)


def _stretched(top1: Any) -> Any:
    import numpy as np

    return -np.log10(np.maximum(100 - np.asarray(top1, float), 1e-6))


def _unstretched(height: Any) -> Any:
    import numpy as np

    return 100 - 10 ** -np.asarray(height, float)
