"""Heat maps of the layers: one row for each layer, one column for each step at which the norms were read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter

from lars.report.svg import inline, styled

# More columns than this are not visible. Then each column shows the value that is farthest from the layer's median.
MOST_COLUMNS = 240
# How many layers the text below a map names.
NAMED = 3
# It names those whose value differs from their median by more than a factor of two.
NOTABLE = np.log10(2)


class HeatMap(NamedTuple):
    """A heat map with its title and the layers that stand out."""

    title: str
    svg: Markup
    outliers: list[str]


def heat_map(
    key: str, title: str, names: list[str], steps: np.ndarray, values: np.ndarray
) -> HeatMap | None:
    """Draw the logarithm of a quantity.

    Args:
        key: A name that no other figure of the page has.
        title: The quantity.
        names: The layers in the order of the network.
        steps: The steps at which the quantity was read, counted from 1. Shape (readings,).
        values: The quantity. Shape (layers, readings). Zero, NaN and infinity are shown as missing.

    Returns:
        The map. None if all values are equal, or if no value is positive and finite.
    """
    known = np.isfinite(values) & (values > 0)
    if not known.any():
        return None
    logs = np.log10(values, out=np.full(values.shape, np.nan), where=known)
    if np.nanmin(logs) == np.nanmax(logs):
        return None
    count = len(names)
    row = min(0.16, max(0.06, 9.0 / count))  # height of a row in inches
    with styled(6.2, 0.8 + row * count) as figure:
        axes = figure.add_subplot()
        places, columns = _columns(logs)
        image = axes.imshow(
            columns, aspect="auto", interpolation="none", cmap="viridis",
            extent=(-0.5, len(places) - 0.5, count - 0.5, -0.5),
        )  # fmt: skip
        axes.grid(visible=False)
        axes.set_xlabel("step")
        ticks = np.unique(np.linspace(0, len(places) - 1, min(7, len(places))).astype(int))
        axes.set_xticks(ticks, [f"{steps[places[tick]]:.0f}" for tick in ticks])
        every = int(np.ceil(0.12 / row))
        axes.set_yticks(range(0, count, every), names[::every], fontsize=7)
        bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.04)
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value:.2g}"))
        low, high = 10 ** np.nanmin(logs), 10 ** np.nanmax(logs)
        outliers = _outliers(names, steps, logs)
        alt = f"{title} of {count} layers over {len(steps)} readings, from {low:.2g} to {high:.2g}."
        return HeatMap(title, inline(figure, key, " ".join([alt, *outliers])), outliers)


def _columns(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Combine neighbouring readings so that at most `MOST_COLUMNS` columns remain.

    Returns:
        The first reading of each column, and the values of shape (layers, columns).
    """
    readings = np.arange(logs.shape[1])
    if len(readings) <= MOST_COLUMNS:
        return readings, logs
    distance = np.nan_to_num(np.abs(logs - _medians(logs)), nan=-1)
    parts = np.array_split(readings, MOST_COLUMNS)
    farthest = np.stack([part[distance[:, part].argmax(axis=1)] for part in parts], axis=1)
    return np.array([part[0] for part in parts]), np.take_along_axis(logs, farthest, axis=1)


def _outliers(names: list[str], steps: np.ndarray, logs: np.ndarray) -> list[str]:
    """The layers that went farthest from their own median, in words."""
    medians = _medians(logs)
    distance = np.nan_to_num(np.abs(logs - medians), nan=-1)
    found = []
    farthest = distance.max(axis=1)
    for layer in [n for n in farthest.argsort()[::-1][:NAMED] if farthest[n] > NOTABLE]:
        read = distance[layer].argmax()
        value, median = 10 ** logs[layer, read], 10 ** medians[layer, 0]
        found.append(f"{names[layer]}: {value:.2g} at step {steps[read]:.0f}, median {median:.2g}.")
    return found


def _medians(logs: np.ndarray) -> np.ndarray:
    """The median of each layer over its readings. Shape (layers, 1). 0 for a layer without readings."""
    known = ~np.isnan(logs).all(axis=1)
    medians = np.zeros((len(logs), 1))
    medians[known, 0] = np.nanmedian(logs[known], axis=1)
    return medians
