"""Curves with as many points as a chart can show."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# More points than this are not visible in a chart.
MOST_POINTS = 300


class Curve(NamedTuple):
    """Values over optimizer steps. Both arrays have shape (points,)."""

    steps: np.ndarray
    values: np.ndarray


class Reduced(NamedTuple):
    """A curve with few points. Each point gives the mean, the lowest and the highest value of a range of steps."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def reduced(curve: Curve, most: int = MOST_POINTS) -> Reduced:
    """Combine neighbouring points so that at most `most` remain. Values that are not finite are left out."""
    finite = np.isfinite(curve.values)
    steps, values = curve.steps[finite], curve.values[finite]
    pieces = min(most, len(values))
    if pieces == 0:
        return Reduced(steps, values, values, values)
    groups = np.array_split(values, pieces)
    return Reduced(
        np.array([part.mean() for part in np.array_split(steps, pieces)]),
        *(np.array([of(part) for part in groups]) for of in (np.mean, np.min, np.max)),
    )
