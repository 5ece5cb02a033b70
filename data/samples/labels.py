"""Faults of the labels of an entire split."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data import SetError


def refuse_labels(
    labels: NDArray[np.int64], num_classes: int, label_base: int, certain: bool
) -> None:
    """Raise SetError for labels that are out of range, or that seem to count from 1.

    Args:
        labels: Label of every image of a split, from 0 after the label base is subtracted.
        num_classes: Number of classes.
        label_base: Label of the first class in the files.
        certain: Whether `num_classes` is known from elsewhere: the files name their classes, or it
            is that of the training images.
    """
    lowest, highest = int(labels.min()), int(labels.max())
    seen = f"labels run from {lowest + label_base} to {highest + label_base}"
    if lowest == highest == -1 and not label_base:
        raise SetError("all labels are -1: these images have no labels, like a published test set")
    if lowest == 1 and not label_base and (highest == num_classes or not certain):
        raise SetError(f"{seen}: this set counts from 1; give --label-base 1")
    if lowest == -1 and label_base:
        raise SetError(f"{seen}: this set counts from 0; leave out --label-base 1")
    if lowest < 0:
        raise SetError(f"{seen}, but the first class has label {label_base}")
    if highest >= num_classes:
        raise SetError(f"{seen}, but there are {num_classes} classes, from {label_base} on")
