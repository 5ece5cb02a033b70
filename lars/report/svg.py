"""Figures as SVG inside a page: they take the page's colours and font, so they follow its light or dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from lars import figures

# The colours of lars.figures without black and grey, which are hard to see on a dark page. page.html has other shades
# of them for dark pages.
COLOURS = tuple(colour.lower() for colour in figures.COLOURS[:6])
# Lines of runs beyond the number of colours.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
# A colour that occurs nowhere else. The page replaces it by the colour of its text.
INK = "#010203"

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # the same figure has the same bytes
    "text.parse_math": False,  # names may contain dollar signs
    "font.family": "sans-serif",
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
}


def colour(number: int) -> str:
    """The colour of a run."""
    return COLOURS[number % len(COLOURS)]


def dashes(number: int) -> tuple[float, ...]:
    """The dashes of a run's lines, in points. Empty for a solid line."""
    return DASHES[number // len(COLOURS) % len(DASHES)]


@contextmanager
def styled(width: float, height: float) -> Iterator[Figure]:
    """Create a figure in the style of the report; `width` and `height` are in inches."""
    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def inline(figure: Figure, key: str, alt: str) -> Markup:
    """Turn a figure of `styled` into an element of the page.

    Args:
        figure: The figure.
        key: A name that no other figure of the page has. It keeps the identifiers of the figures apart.
        alt: What the figure shows, for readers who cannot see it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'\b(id="|href="#)', rf"\g<1>{key}-", text).replace("url(#", f"url(#{key}-")
    text = re.sub(r' d="[^"]*"', _rounded, text)
    text = text.replace(INK, "currentColor")
    for number, value in enumerate(COLOURS):
        text = text.replace(value, f"var(--run-{number})")
    text = text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
    return Markup(re.sub(r"\s*\n\s*", " ", text))


def _rounded(path: re.Match[str]) -> str:
    """A path with coordinates of one decimal, which is finer than a pixel."""
    return re.sub(r"(\.\d)\d+", r"\1", path[0])
