"""Draw curves of runs: accuracy, loss and learning rate."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lars.config import Config
from lars.errors import UsageError
from lars.figures import figure, format_of, legend, look, save, style
from lars.run.records import RunRecord, read_runs, runs_parser

EXAMPLES = """\
examples:
  one run:
    python -m lars.plot logs/imagenet/RUN --out curves.png
  all runs in a folder, only the accuracy, over the hours of training, for a paper:
    python -m lars.plot logs/imagenet --metric top1 --x hours --out accuracy.pdf
  the training loss over a learning rate that grows during the run:
    python -m lars.plot logs/imagenet/RAMP --metric loss --x lr --out ramp.png
"""

AXES = {
    "epochs": "epoch",
    "steps": "optimizer step",
    "hours": "hours of training",
    "lr": "learning rate",
}
_METRICS = {"top1": "top-1 (%)", "top5": "top-5 (%)", "loss": "loss", "lr": "learning rate"}
_SPLITS = {"val": "validation", "train": "training", "val_ema": "validation (average)"}
_LINES: dict[str, Any] = {"val": "-", "train": (0, (4, 2)), "val_ema": ":"}

# With more runs than this, only the validation is drawn.
_FEW_RUNS = 3
# With more points than this, a curve has no markers.
_FEW_POINTS = 40

# Letters of a folder's name in a label.
_LONGEST_NAME = 30

# Flags that identify a run best, in this order, and how the labels name flags. "" leaves the name out.
_FIRST_FLAGS = ("base_op", "lars_form", "lamb_form", "effective_batch_size", "base_lr")
_FLAG_WORDS = {
    "base_op": "",
    "model": "",
    "lars_form": "",
    "lamb_form": "",
    "effective_batch_size": "batch",
    "batch_size": "micro-batch",
    "base_lr": "lr",
    "wd": "weight decay",
}


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """A short name for each run: the values of as few flags as are needed to distinguish the runs.

    Example:
        ["lars, batch 256", "lars, batch 1024", "sgd, batch 256", "sgd, batch 1024"]
    """
    settings = [_settings(run) for run in runs]
    names = list(dict.fromkeys([*_FIRST_FLAGS, *itertools.chain(*settings)]))
    names.sort(key=lambda name: name == "seed")  # the last one
    chosen: list[str] = []
    distinct = 1
    for name in names:
        found = len({tuple(str(each.get(n)) for n in (*chosen, name)) for each in settings})
        if found > distinct:
            chosen, distinct = [*chosen, name], found
    made = [
        ", ".join(_words(name, each[name]) for name in chosen if each.get(name) is not None)
        for each in settings
    ]
    made = [label or ", ".join(f"default {_words(name, '')}" for name in chosen) for label in made]
    return [
        label if made.count(label) == 1 else f"{label} {folder}".strip()
        for label, folder in zip(made, _short_names([run.folder for run in runs]), strict=True)
    ]


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The part of each path that distinguishes it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    while len({each[0] for each in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [each[1:] for each in parts]
    while len({each[-1] for each in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [each[:-1] for each in parts]
    names = ["/".join(each) for each in parts]
    return [n if len(n) <= _LONGEST_NAME else f"...{n[-_LONGEST_NAME:]}" for n in names]


def _settings(run: RunRecord) -> dict[str, Any]:
    """The flags that may distinguish runs. Paths, names and the machine do not."""
    known = fields(Config)
    may_change = {field.name for field in known if not field.metadata["same_run"]}
    defaults = {field.name: field.default for field in known if field.name not in may_change}
    flags = {
        name: value
        for name, value in run.flags.items()
        if name not in may_change and not name.endswith("_dir") and "/" not in str(value)
    }
    batch = run.plan.get("effective_batch_size")
    # A run that is older than a flag has its default.
    return {**defaults, **flags, "effective_batch_size": batch}


def _words(name: str, value: Any) -> str:
    word = _FLAG_WORDS.get(name, name.replace("_", " "))
    if isinstance(value, bool):
        return word if value else f"no {word}"
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    return f"{word} {value:g}".strip() if isinstance(value, float) else f"{word} {value}".strip()


class Curves:
    """The curves of a run: one point per epoch, and the readings within the epochs from TensorBoard's file."""

    def __init__(self, run: RunRecord) -> None:
        """Read the readings of the training metrics; see --log-every of the trainer."""
        self.run = run
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        board = EventAccumulator(str(run.folder), size_guidance={"scalars": 0})
        board.Reload()
        # A curve is empty after a restart that has discarded its points and has not read any yet.
        self.readings = {
            tag.removeprefix("train/"): [(event.step, event.value) for event in events]
            for tag in board.Tags()["scalars"]
            if tag.startswith("train/") and (events := board.Scalars(tag))
        }

    def position(self, steps: Sequence[int], x: str) -> np.ndarray[Any, Any]:
        """The positions of steps on an axis. Nan after the last finished epoch."""
        if x == "steps":
            return np.asarray(steps, dtype=float)
        rows = self.run.split("train")
        if x == "epochs":
            at = [row["epoch"] for row in rows]
        else:
            at = [self.run.training_seconds(row["epoch"]) / 3600 for row in rows]
        return np.interp(steps, [0, *(row["step"] for row in rows)], [0.0, *at], right=math.nan)

    def points(self, split: str, metric: str, x: str) -> tuple[np.ndarray[Any, Any], list[float]]:
        """Positions and values of a curve."""
        if x == "lr":
            rates = dict(self.readings.get("lr", []))
            found = [point for point in self.readings.get(metric, []) if point[0] in rates]
            return np.asarray([rates[step] for step, _ in found]), [value for _, value in found]
        if metric == "lr" and self.readings.get("lr"):
            points = self.readings["lr"]
        else:
            points = [(row["step"], row[metric]) for row in self.run.split(split) if metric in row]
        return self.position([step for step, _ in points], x), [value for _, value in points]


def draw(runs: Sequence[RunRecord], metrics: Sequence[str], x: str = "epochs") -> Figure:
    """Draw one panel for each metric, with the curves of all runs.

    Args:
        runs: The runs. Up to three are drawn with training and validation, more with validation only.
        metrics: Metrics of metrics.jsonl such as top1 and loss, or lr for the learning rate.
        x: The horizontal axis: epochs, steps, hours (of training) or lr.

    Raises:
        UsageError: No run has such a metric.
    """
    curves = [Curves(run) for run in runs]
    names = labels(runs) if len(runs) > 1 else [""]
    with style():
        drawn, panels = figure(len(metrics))
        used: set[str] = set()
        for axes, metric in zip(panels, metrics, strict=True):
            used |= _draw_panel(axes, curves, metric, x)
        handles = [
            Line2D([], [], **look(number), label=name) for number, name in enumerate(names) if name
        ]
        if len(used) > 1:
            handles += [
                Line2D([], [], color="#555555", linestyle=_LINES[split], label=_SPLITS[split])
                for split in _SPLITS
                if split in used
            ]
        legend(drawn, handles)
    return drawn


def _draw_panel(axes: Axes, curves: Sequence[Curves], metric: str, x: str) -> set[str]:
    """Draw one metric of all runs. Return the splits that were drawn."""
    splits = _splits_of(curves, metric, x)
    values: list[float] = []
    used = set()
    for split in splits:
        for number, each in enumerate(curves):
            at, found = each.points(split, metric, x)
            if not found:
                continue
            used.add(split)
            values += found
            line = look(number)
            if len(splits) > 1 and split != "val":
                line |= {"linestyle": _LINES[split], "marker": "", "alpha": 0.7}
            elif metric == "lr" or len(found) > _FEW_POINTS:
                line["marker"] = ""
            axes.plot(at, found, **line)
    if not used:
        raise UsageError(f"--metric {metric}: {_available(curves)}")
    name = _METRICS.get(metric, metric)
    only = "" if len(used) > 1 or metric == "lr" else f"{_SPLITS[next(iter(used))]} "
    axes.set(xlabel=AXES[x], ylabel=f"{only}{name}")
    if metric == "lr":
        _scale_rates(axes)
    elif metric == "loss" and _spans_decades(values):
        axes.set_yscale("log")
    if x == "lr":
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    return used if metric != "lr" else set()


def _splits_of(curves: Sequence[Curves], metric: str, x: str) -> list[str]:
    """The splits to draw: the learning rate belongs to the training, and many runs would be hard to distinguish."""
    if metric == "lr" or x == "lr":
        return ["train"]
    if len(curves) <= _FEW_RUNS:
        return list(_SPLITS)
    return ["val"] if any(each.points("val", metric, x)[1] for each in curves) else ["train"]


def _scale_rates(axes: Axes) -> None:
    """Choose a logarithmic axis if the highest learning rates of the runs differ much."""
    peaks = [max(map(float, np.asarray(line.get_ydata()))) for line in axes.get_lines()]
    lowest = min((peak for peak in peaks if peak > 0), default=1.0)
    if max(peaks) > 10 * lowest:
        axes.set_yscale("log")
        axes.set_ylim(bottom=lowest / 100)
    else:
        axes.set_ylim(bottom=0)


def _spans_decades(values: Sequence[float]) -> bool:
    """Whether the largest value is so large that the others could not be distinguished on a linear axis."""
    positive = [value for value in values if 0 < value < math.inf]
    return bool(positive) and max(positive) > 30 * min(positive)


def _available(curves: Sequence[Curves]) -> str:
    found = dict.fromkeys(
        name
        for each in curves
        for name, points in each.readings.items()
        if points and name != "images_per_second"
    )
    found |= dict.fromkeys(name for each in curves for row in each.run.rows for name in row)
    known = [name for name in found if name in _METRICS] or ["nothing yet"]
    return f"no run has such values for this axis; the runs have {', '.join(known)}"


def _with_rows(runs: Sequence[RunRecord], x: str) -> Iterator[RunRecord]:
    """The runs that have something to draw. The others are reported."""
    for run in runs:
        if run.rows or x == "lr":
            yield run
        else:
            print(f"{run.folder} has no finished epoch yet; it is left out")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    parser = runs_parser("python -m lars.plot", __doc__, EXAMPLES)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the figure: .png, .pdf or .svg"
    )
    parser.add_argument(
        "--x",
        choices=tuple(AXES),
        default="epochs",
        help="horizontal axis; hours counts training without validation; lr draws the training metrics over the "
        "learning rate (default: %(default)s)",
    )
    parser.add_argument(
        "--metric",
        nargs="+",
        default=None,
        metavar="NAME",
        help="one panel for each: top1, top5, loss, lr (default: top1 loss lr; with --x lr: top1 loss)",
    )
    options = parser.parse_args(argv)
    metrics = options.metric or ["top1", "loss", *(["lr"] if options.x != "lr" else [])]
    try:
        format_of(options.out)  # before the runs are read, which may take a while
        runs = list(_with_rows(read_runs(options.runs), options.x))
        if not runs:
            raise UsageError("no run has a finished epoch yet, so there is nothing to draw")
        save(draw(runs, metrics, options.x), options.out)
    except UsageError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--out {options.out} cannot be written: {error.strerror or error}")
    print(options.out)


if __name__ == "__main__":
    main()
