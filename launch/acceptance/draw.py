"""A figure of what was measured: one panel for each unit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.lines import Line2D

from lars import figures
from launch.acceptance.rows import FAILED, NOT_TESTED, OK, SLOW, Row

_UNITS = ("images/s", "ms", "GB/s", "GB/s (bus)")
_COLOURS = dict(zip((OK, SLOW, FAILED, NOT_TESTED), figures.COLOURS, strict=False))


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draw the rows with a number as bars. Returns False, and draws nothing, if there are none."""
    panels = {unit: [r for r in rows if r.unit == unit and r.value] for unit in _UNITS}
    panels = {unit: found for unit, found in panels.items() if found}
    if not panels:
        return False
    with figures.style():
        drawn, axes = figures.figure(1)
        drawn.clear()
        counts = [len(found) for found in panels.values()]
        drawn.set_size_inches(figures.PAGE_INCHES, 0.8 * len(counts) + 0.2 * sum(counts))
        axes = drawn.subplots(len(panels), 1, squeeze=False, height_ratios=counts)[:, 0]
        for axis, (unit, found) in zip(axes, panels.items(), strict=True):
            found = found[::-1]  # the first row on top
            bars = axis.barh(
                [row.what for row in found],
                [row.value for row in found],
                color=[_COLOURS[row.verdict] for row in found],
            )
            axis.bar_label(bars, [f"{row.value:,.4g}" for row in found], padding=2)
            for row in found:
                for limit in (row.low, row.high):
                    if limit is not None:
                        axis.axvline(limit, color=figures.COLOURS[6], linestyle=":", linewidth=0.8)
            axis.set_xlabel(unit)
            axis.grid(axis="y", visible=False)
            axis.margins(x=0.12)
        verdicts = dict.fromkeys(row.verdict for found in panels.values() for row in found)
        if len(verdicts) > 1:
            handles = [Line2D([], [], color=_COLOURS[v], linewidth=5, label=v) for v in verdicts]
            figures.legend(drawn, handles)
    figures.save(drawn, path)
    return True
