"""The curves of the report. Each function draws one figure with all runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from lars import expected
from lars.report.curves import Curve, reduced
from lars.report.run import ReportedRun
from lars.report.svg import INK, colour, dashes, inline, styled

# Size of a figure in inches. Its text is legible where a page has room for 400 CSS pixels.
SIZE = (4.4, 2.9)
# An axis is logarithmic if its highest value is this many times its lowest one.
WIDE_RANGE = 30.0


class Chart(NamedTuple):
    """A figure with its title and an explanation of its lines."""

    title: str
    svg: Markup
    note: str


def charts(runs: Sequence[ReportedRun]) -> list[Chart]:
    """Draw all figures for which the runs have data."""
    kinds = (accuracy, loss, learning_rate, gradient_norm, throughput, data_wait)
    return [chart for kind in kinds if (chart := kind(runs)) is not None]


def accuracy(runs: Sequence[ReportedRun]) -> Chart | None:
    """The metric that decides which network is the best, over epochs."""
    metric = runs[0].summary["metric"]
    published = _published(runs)

    def draw(axes: Axes) -> None:
        for curve, last_epoch in published:
            _draw_published(axes, curve, last_epoch)
        for run in runs:
            _draw_rows(axes, run, "train", metric, alpha=0.45, linewidth=0.9)
            _draw_rows(axes, run, "val_ema", metric, linestyle=(0, (3, 1.5)))
            _draw_rows(axes, run, "val", metric, marker="o")

    title = "Top-1 accuracy (%)" if metric == "top1" else metric
    values = [_last(run, metric) for run in runs]
    note = "Bold: validation. Thin: training."
    if any(run.rows("val_ema", metric) for run in runs):
        note += " Dashed: validation of the moving average."
    for curve, _ in published:
        smallest, largest = curve.batch
        note += (
            f" Grey: {curve.runs} published runs with batch sizes of {smallest} to {largest} ({curve.name}): lowest to "
            "highest, 5th to 95th percentile (darker), and median."
        )
    return _chart("accuracy", title, draw, f"{title}. {'; '.join(values)}", note)


def _published(runs: Sequence[ReportedRun]) -> list[tuple[expected.Curve, int]]:
    """The published runs with which the runs compare, each with the last epoch that is comparable."""
    found: dict[str, tuple[expected.Curve, int]] = {}
    for run in runs:
        if run.published is not None:
            last = run.published.last_epoch(run.record.flags.get("epochs", 0))
            _, before = found.get(run.published.name, (run.published, 0))
            found[run.published.name] = (run.published, max(last, before))
    return [(curve, last) for curve, last in found.values() if last >= curve.epochs[0]]


def _draw_published(axes: Axes, curve: expected.Curve, last_epoch: int) -> None:
    """Draw the range of the accuracies of published runs."""
    points = sum(epoch <= last_epoch for epoch in curve.epochs)
    epochs = curve.epochs[:points]
    for low, high in ((curve.min, curve.max), (curve.p5, curve.p95)):
        axes.fill_between(epochs, low[:points], high[:points], color=INK, alpha=0.1, linewidth=0)
    axes.plot(epochs, curve.median[:points], color=INK, alpha=0.5, linestyle=":", linewidth=1)


def loss(runs: Sequence[ReportedRun]) -> Chart | None:
    """Training and validation loss over epochs, and the steps that were skipped."""

    def draw(axes: Axes) -> None:
        for run in runs:
            _draw_curve(axes, run, "loss", alpha=0.6, linewidth=0.9)
            _draw_rows(axes, run, "val", "loss", marker="o")
            skipped = [row["step"] / run.steps_per_epoch for row in run.summary["skipped_steps"]]
            dotted: dict[str, Any] = {
                "color": colour(run.number),
                "linewidth": 0.8,
                "linestyle": ":",
            }
            axes.vlines(skipped, 0, 1, transform=axes.get_xaxis_transform(), **dotted)

    note = "Bold: validation. Thin: training, with the range of its readings."
    if any(run.summary["skipped"] for run in runs):
        note += " Dotted: skipped steps."
    values = [_last(run, "loss") for run in runs]
    return _chart("loss", "Loss", draw, f"Loss. {'; '.join(values)}", note)


def learning_rate(runs: Sequence[ReportedRun]) -> Chart | None:
    """The learning rate over epochs."""
    peaks = [(run.name, run.record.plan.get("peak_lr", math.nan)) for run in runs]
    alt = "Learning rate. " + "; ".join(f"{name}: peak {peak:g}" for name, peak in peaks)
    return _readings("lr", "Learning rate", runs, "lr", alt, "The rate that the step used.")


def throughput(runs: Sequence[ReportedRun]) -> Chart | None:
    """Images per second over epochs."""
    speeds = [(run.name, run.summary["images_per_second"]) for run in runs]
    alt = "Images per second. " + "; ".join(
        f"{name}: mean {speed:.0f}" for name, speed in speeds if speed
    )
    note = "Training steps of all ranks, without validation and checkpoints."
    return _readings(
        "speed", "Images per second", runs, "images_per_second", alt, note, from_zero=True
    )


def gradient_norm(runs: Sequence[ReportedRun]) -> Chart | None:
    """The norm of the whole gradient over epochs."""
    alt = "Norm of the gradient over epochs."
    note = "The largest norm since the last reading, before clipping."
    return _readings("norm", "Gradient norm", runs, "grad_norm", alt, note)


def data_wait(runs: Sequence[ReportedRun]) -> Chart | None:
    """The share of the time that each epoch waited for data."""

    def draw(axes: Axes) -> None:
        for run in runs:
            rows = [row for row in run.record.split("train") if row.get("data_seconds") is not None]
            shares = [100 * row["data_seconds"] / row["seconds"] for row in rows]
            _line(axes, run, [row["epoch"] for row in rows], shares, marker="o")
        axes.set_ylim(0, max(10, axes.get_ylim()[1]))

    alt = "Share of the time of each epoch in which rank 0 waited for data."
    note = "Share of the step time in which rank 0 waited for batches."
    return _chart("data", "Waiting for data (%)", draw, alt, note)


def _readings(
    key: str,
    title: str,
    runs: Sequence[ReportedRun],
    tag: str,
    alt: str,
    note: str,
    *,
    from_zero: bool = False,
) -> Chart | None:
    """Draw a curve of TensorBoard."""

    def draw(axes: Axes) -> None:
        for run in runs:
            _draw_curve(axes, run, tag)
        if from_zero:
            axes.set_ylim(bottom=0)

    return _chart(key, title, draw, alt, note)


def _chart(key: str, title: str, draw: Callable[[Axes], None], alt: str, note: str) -> Chart | None:
    """Draw a figure over epochs. None if there is nothing to show."""
    with styled(*SIZE) as figure:
        axes = figure.add_subplot()
        draw(axes)
        if not any(map(_is_visible, axes.lines)):
            return None
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if key in ("loss", "norm", "lr"):
            _logarithmic_if_wide(axes, between_runs=key == "lr")
        return Chart(title, inline(figure, key, alt), note)


def _is_visible(line: Line2D) -> bool:
    """Whether a line shows anything. A single point needs a marker."""
    points = np.isfinite(np.asarray(line.get_ydata(), dtype=float)).sum()
    return bool(points > 1 or (points and line.get_marker() != "None"))


def _logarithmic_if_wide(axes: Axes, *, between_runs: bool) -> None:
    """Use a logarithmic axis if the values differ by orders of magnitude.

    With `between_runs`, only the highest values of the runs are compared, because a learning rate ends near 0.
    """
    curves = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]
    positive = [values[np.isfinite(values) & (values > 0)] for values in curves]
    positive = [values for values in positive if len(values)]
    highest = [values.max() for values in positive]
    lowest = highest if between_runs else [values.min() for values in positive]
    if max(highest, default=1) <= WIDE_RANGE * min(lowest, default=1):
        return
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if between_runs:
        axes.set_ylim(bottom=min(highest) / 1000)


def _draw_rows(axes: Axes, run: ReportedRun, split: str, metric: str, **style: Any) -> None:
    """Draw the values of a metric at the ends of the epochs."""
    rows = run.rows(split, metric)
    if rows:
        _line(axes, run, [row["epoch"] for row in rows], [row[metric] for row in rows], **style)


def _draw_curve(axes: Axes, run: ReportedRun, tag: str, **style: Any) -> None:
    """Draw a curve of TensorBoard with the range of the values that each point combines."""
    curve = run.readings.get(tag)
    if curve is None:
        return
    points = reduced(Curve(curve.steps / run.steps_per_epoch, curve.values))
    _line(axes, run, points.steps, points.mean, **style)
    if np.any(points.low < points.high):
        shade: dict[str, Any] = {"color": colour(run.number), "alpha": 0.2, "linewidth": 0}
        axes.fill_between(points.steps, points.low, points.high, **shade)


def _line(axes: Axes, run: ReportedRun, x: Any, y: Any, **style: Any) -> None:
    options = {"color": colour(run.number), "dashes": dashes(run.number)} | style
    if "linestyle" in style or not options["dashes"]:
        del options["dashes"]
    if len(x) > 40:
        options.pop("marker", None)
    axes.plot(x, y, **options)


def _last(run: ReportedRun, metric: str) -> str:
    """The last validation in words."""
    rows = run.rows("val", metric)
    if not rows:
        return f"{run.name}: no validation yet"
    return f"{run.name}: {rows[-1][metric]:.4g} after epoch {rows[-1]['epoch']}"
