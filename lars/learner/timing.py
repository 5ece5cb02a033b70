"""Measuring how long the host waits for batches."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from lars.learner.task import Batch


class TimedIterator:
    """An iterator that measures how long its user waits for items.

    Attributes:
        seconds: The total time of all calls of `next` so far.
    """

    def __init__(self, items: Iterable[Batch]) -> None:
        """Measure the iteration over `items`."""
        self.items = iter(items)
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - began
