"""Which layer left its usual range first: the explanation of a divergence.

A value of a layer is out of range if it is more than `FACTOR` times its usual value. The usual value is the median of
the layer's previous `HISTORY` readings. The first `FEWEST` readings of a run have no such median, and the relative
update of a weight matrix is compared with the median over all matrices. The relative update is compared per unit of
learning rate, because a warm-up raises it. It is not known where the rate is 0, as in the first step of a warm-up.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

from lars.observe.layer_file import QUANTITIES, LayerHistory

FACTOR = 10.0
HISTORY = 15
FEWEST = 3
# As many readings as the search looks back.
READINGS = 2 * HISTORY
WORDS = {
    "weight_norm": "weight norm",
    "grad_norm": "gradient norm",
    "trust_ratio": "trust ratio",
    "update_ratio": "relative update",
}
UPDATE, GRADIENT = QUANTITIES.index("update_ratio"), QUANTITIES.index("grad_norm")


class Departure(NamedTuple):
    """A layer that has left its range.

    Attributes:
        step: The optimizer step.
        layer: Name of the parameter.
        quantity: The quantity that is out of range; one of `QUANTITIES`.
        usual: The usual value.
        value: The value.
        is_early: Whether `usual` is the median over the layers, not that of the layer's own readings.
    """

    step: int
    layer: str
    quantity: str
    usual: float
    value: float
    is_early: bool

    def __str__(self) -> str:
        """The departure in one line."""
        what = WORDS[self.quantity]
        if self.is_early:
            others = f"the median over the layers was {self.usual:.3g}"
            return f"{self.layer}: {what} {self.value:.3g} at step {self.step}; {others}"
        return f"{self.layer}: {what} {self.usual:.3g} -> {self.value:.3g} at step {self.step}"


def first_departure(
    history: LayerHistory, rates: np.ndarray, matrices: np.ndarray
) -> Departure | None:
    """Find the layer that left its range first in the episode that lasts until the last reading.

    Earlier departures that ended by themselves do not count. If several layers leave their range at the same reading,
    the one whose value grew most is chosen. A gradient counts only if nothing else is out of range, because it depends
    on all layers.

    Args:
        history: The last readings.
        rates: Learning rate at each reading.
        matrices: Which layers are weight matrices, a bool array.

    Returns:
        The departure. None if no layer is out of its range at the last reading.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = history.values.astype(np.float64)
        scaled[:, UPDATE] /= rates[:, None]
        usual = np.stack([_usual(scaled, i) for i in range(len(scaled))])
        if history.steps[0] == 1 and matrices.any():
            updates = scaled[:FEWEST, UPDATE]
            updates_usual = _median(updates[:, matrices], axis=1)[:, None]
            usual[:FEWEST, UPDATE] = np.where(matrices, updates_usual, np.nan)
        growth = np.where(usual > 0, scaled / usual, 0.0)
    growth = np.where(growth > FACTOR, growth, 0.0)  # 0 where a value is in its range, or nan
    calm = np.flatnonzero(~growth.any(axis=(1, 2)))
    first = int(calm[-1]) + 1 if len(calm) else 0
    if first == len(growth):
        return None
    found = growth[first].copy()
    if np.delete(found, GRADIENT, axis=0).any():
        found[GRADIENT] = 0.0
    quantity, layer = np.unravel_index(int(found.argmax()), found.shape)
    unit = rates[first] if quantity == UPDATE else 1.0
    return Departure(
        step=int(history.steps[first]),
        layer=history.layers[layer],
        quantity=QUANTITIES[quantity],
        usual=float(usual[first, quantity, layer] * unit),
        value=float(history.values[first, quantity, layer]),
        is_early=first < FEWEST,
    )


def _usual(values: np.ndarray, reading: int) -> np.ndarray:
    """The medians of the readings before this one, of shape (quantities, layers); nan if they are too few."""
    if reading < FEWEST:
        return np.full(values.shape[1:], np.nan)
    return _median(values[max(0, reading - HISTORY) : reading], axis=0)


def _median(values: np.ndarray, axis: int) -> np.ndarray:
    """The median of the known values along an axis; nan if there are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # from an axis without known values
        return np.nanmedian(values, axis=axis)


def explanation(history: LayerHistory, rates: np.ndarray, matrices: np.ndarray) -> str:
    """Explain a divergence in one line; see `first_departure` for the arguments."""
    departure = first_departure(history, rates, matrices)
    if departure is not None:
        return f"the first layer that left its range is {departure}"
    text = f"no layer had left its range at step {history.steps[-1]}, the last one that was read"
    updates = np.where(matrices, history["update_ratio"][-1], np.nan)
    if np.isfinite(updates).any():
        largest = int(np.nanargmax(updates))
        text += f"; the largest relative update was {updates[largest]:.3g}, of {history.layers[largest]}"
    return text
