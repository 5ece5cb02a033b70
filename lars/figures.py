"""The style of this project's figures: sizes, colours and files. Other programs that draw use it too.

Example:
    with style():
        drawn, (axes,) = figure()
        axes.plot([1, 2], [3, 4], **look(0))
    save(drawn, Path("line.png"))
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lars.errors import UsageError
from lars.run.files import atomic_write

# Colours that colour-blind readers can distinguish (Okabe and Ito, without their yellow, which is faint on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

# A page of a paper is about 7 inches wide, and its columns 3.4. Fonts have their size in print.
PAGE_INCHES, COLUMN_INCHES, HEIGHT_INCHES, DPI = 7.0, 3.4, 2.3, 200
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "figure.facecolor": "white",  # so that the labels are legible on dark pages too
    "pdf.fonttype": 42,  # fonts that editors and publishers accept
    "svg.hashsalt": "lars",  # equal figures give equal files
}
# Entries of a file that would differ between equal figures.
_NO_DATE: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}


def style() -> AbstractContextManager[None]:
    """The style of all figures of this project, for a ``with`` block that draws one."""
    return matplotlib.rc_context(_STYLE)


def figure(panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Create a figure with panels side by side: one as wide as a column, more as wide as a page.

    Use it within ``with style():``. It needs no display.
    """
    width = COLUMN_INCHES if panels == 1 else PAGE_INCHES
    made = Figure(figsize=(width, HEIGHT_INCHES), layout="constrained")
    return made, list(made.subplots(1, panels, squeeze=False)[0])


def look(number: int) -> dict[str, Any]:
    """Colour, marker and line of a run. The second group of eight runs has dash-dotted lines."""
    again, place = divmod(number, len(COLOURS))
    return {
        "color": COLOURS[place],
        "marker": MARKERS[place],
        "linestyle": ("-", "-.")[again % 2],
    }


def legend(drawn: Figure, handles: Sequence[Line2D]) -> None:
    """Add a legend above the panels, in as many columns as fit. Its height is added to the figure."""
    if not handles:
        return
    width, height = drawn.get_size_inches()
    labels = [str(handle.get_label()) for handle in handles]
    fitting = (n for n in range(len(labels), 1, -1) if _legend_width(labels, n) <= 72 * width)
    columns = next(fitting, 1)
    drawn.set_size_inches(width, height + 0.17 * math.ceil(len(labels) / columns))
    drawn.legend(
        handles=list(handles), loc="outside upper center", ncols=columns, columnspacing=1.2
    )


def _legend_width(labels: Sequence[str], columns: int) -> float:
    """About the width of a legend in points: 4.3 for a letter, and 37 for a line and the gaps beside it."""
    rows, longer = divmod(len(labels), columns)  # the first columns have one more entry
    heights = [rows + (column < longer) for column in range(columns)]
    ends = list(itertools.accumulate(heights, initial=0))
    parts = [labels[first:last] for first, last in itertools.pairwise(ends)]
    return sum(4.3 * max(map(len, part)) + 37 for part in parts)


def format_of(path: Path) -> str:
    """The format of a figure's file: png, pdf or svg.

    Raises:
        UsageError: The name of the file has another ending.
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in _NO_DATE:
        raise UsageError(f"--out {path}: the name must end in .png, .pdf or .svg")
    return kind


def save(drawn: Figure, path: Path) -> None:
    """Write a figure as PNG, PDF or SVG. The file appears when it is complete, and equal figures give equal files.

    Raises:
        UsageError: The name of the file has another ending.
    """
    kind = format_of(path)
    with style(), atomic_write(path) as file:
        drawn.savefig(file, format=kind, dpi=DPI, metadata=_NO_DATE[kind])
