"""The figures of the scaling model, in the style of this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.scaling import published
from benchmarks.scaling.machine import Machine
from benchmarks.scaling.predict import Step
from lars import figures

_PLAIN = FuncFormatter(lambda value, _: f"{value:,.10g}")


def _powers_of_two(axes: Axes, counts: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    shown = [n for place, n in enumerate(counts) if place % (1 + len(counts) // 8) == 0]
    axes.set_xticks(shown, [f"{n:,}" for n in shown], minor=False)
    axes.xaxis.set_minor_locator(LogLocator(2, subs=(1,)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label_decimal(axis: Axis) -> None:
    """A logarithmic axis that labels 1, 2, 5, 10, 20, ..."""
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(_PLAIN)


def scaling(steps: Sequence[Step], path: Path) -> None:
    """Draw speed and efficiency against the number of ranks, and what a step consists of."""
    counts = [step.job.ranks for step in steps]
    rates = [step.rate for step in steps]
    with figures.style():
        drawn, (speed, parts) = figures.figure(2)
        perfect = [rates[0] * n / counts[0] for n in counts]
        speed.plot(counts, perfect, color="#999999", linestyle=":")
        speed.plot(counts, rates, **figures.look(0))
        speed.set_yscale("log")
        _label_decimal(speed.yaxis)
        speed.margins(y=0.12)
        _powers_of_two(speed, counts)
        speed.set(xlabel="ranks", ylabel="images/s")
        for step, n in zip(
            steps[:: max(1, len(steps) // 5)], counts[:: max(1, len(steps) // 5)], strict=True
        ):
            share = step.rate / (rates[0] * n / counts[0])
            speed.annotate(f"{share:.0%}", (n, step.rate), (3, -9), textcoords="offset points")
        names = {
            "forward_backward": "forward and backward", "update": "optimizer", "statistics": "BatchNorm statistics",
            "exposed": "exchange, not hidden", "waiting": "waiting for images",
        }  # fmt: skip
        bottom = [0.0] * len(steps)
        places = range(len(steps))
        handles: list[Any] = [
            Line2D([], [], color="#999999", linestyle=":", label="perfect scaling"),
            Line2D([], [], **figures.look(0), label="predicted"),
        ]
        for colour, (field, label) in zip(figures.COLOURS, names.items(), strict=False):
            values = [1000 * getattr(step, field) for step in steps]
            if max(values) > 0.005 * max(1000 * step.step for step in steps):
                bars = parts.bar(places, values, bottom=bottom, color=colour, label=label)
                handles.append(bars)
            bottom = [a + b for a, b in zip(bottom, values, strict=True)]
        parts.set_xticks(places, [f"{n:,}" for n in counts])
        parts.set(xlabel="ranks", ylabel="ms per step")
        figures.legend(drawn, handles)
    figures.save(drawn, path)


def minutes(lines: Mapping[str, Sequence[tuple[Machine, int, int]]], path: Path) -> None:
    """Draw the predicted minutes to 75.9 % with the best batch size, and the published MLPerf runs as points.

    Args:
        lines: Machine, hosts and GPUs of a host for each point of a line, by the name of the line.
        path: The file.
    """
    with figures.style():
        drawn, (axes, batches) = figures.figure(2)
        handles: list[Line2D] = []
        for number, (name, places) in enumerate(lines.items()):
            look = figures.look(number) | {"marker": ""}
            best = [
                published.choices(published.on_mlperf_clock(m), nodes, n)[0]
                for m, nodes, n in places
            ]
            counts = [choice.step.job.ranks for choice in best]
            axes.plot(counts, [choice.minutes for choice in best], **look)
            batches.plot(counts, [choice.published.batch for choice in best], **look)
            handles.append(Line2D([], [], **look, label=f"{name}, predicted"))
            points = [p for p in published.points() if p.gpu == name]
            if points:
                dots = figures.look(number) | {"linestyle": ""}
                axes.plot([p.gpus for p in points], [p.minutes for p in points], **dots)
                batches.plot([p.gpus for p in points], [p.batch for p in points], **dots)
                handles.append(Line2D([], [], **dots, label=f"{name}, MLPerf"))
        for panel in (axes, batches):
            _powers_of_two(panel, counts)
            panel.set_xlabel("GPUs")
        axes.set_yscale("log")
        _label_decimal(axes.yaxis)
        batches.set_yscale("log", base=2)
        batches.yaxis.set_major_formatter(_PLAIN)
        axes.set_ylabel("minutes to 75.9 % top-1")
        batches.set_ylabel("fastest effective batch size")
        figures.legend(drawn, handles)
    figures.save(drawn, path)


def errors(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw predicted against measured step times, with a band of 15 %."""
    with figures.style():
        drawn, (axes,) = figures.figure()
        values = [1000 * row[name] for row in rows for name in ("predicted", "measured")]
        ends = [0.8 * min(values), 1.25 * max(values)]
        axes.plot(ends, ends, color="#999999")
        axes.fill_between(ends, [0.85 * e for e in ends], [1.15 * e for e in ends], color="#eeeeee")
        handles: list[Line2D] = []
        for number, how in enumerate(dict.fromkeys(row["how"] for row in rows)):
            look = figures.look(number) | {"linestyle": ""}
            mine = [row for row in rows if row["how"] == how]
            axes.plot(
                [1000 * r["measured"] for r in mine], [1000 * r["predicted"] for r in mine], **look
            )
            handles.append(Line2D([], [], **look, label=how))
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            _label_decimal(axis)
        axes.set(
            xlabel="measured ms per step", ylabel="predicted ms per step", xlim=ends, ylim=ends
        )
        figures.legend(drawn, handles)
    figures.save(drawn, path)
