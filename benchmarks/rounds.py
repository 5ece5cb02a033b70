"""Measure candidates in turn, round by round, so that a slow moment of the machine affects all of them alike."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# Takes one measurement of one or several candidates, and returns their values by name.
Turn = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: The candidate.
        against: Name of the row that it is compared with. "": none.
        lacks: The package that it needs and that is not installed. "": nothing is missing.
    """

    name: str
    against: str = ""
    lacks: str = ""


@dataclass(frozen=True)
class Comparison:
    """Candidates that are ready to be measured: the rows of a table, and the turns that give their values."""

    rows: list[Row]
    turns: list[Turn]


@dataclass(frozen=True)
class Suite:
    """A benchmark of ``python -m benchmarks``.

    Attributes:
        name: Its name for ``--only``.
        title: The heading of its table.
        about: What it measures, in a few sentences.
        unit: "ms", "CPU ms", "s", "images/s" or "requests".
        prepare: Builds the candidates in a temporary folder and cleans up at the end.
        quick: Whether it is part of ``--quick``.
        warm_up: Whether a first round does not count. False for long turns, and for those that start processes.
        rounds: Largest number of rounds.
    """

    name: str
    title: str
    about: str
    unit: str
    prepare: Callable[..., contextlib.AbstractContextManager[Comparison]]
    quick: bool = True
    warm_up: bool = True
    rounds: int = 15


def alone(name: str, measure: Callable[[], float]) -> Turn:
    """A turn that measures one candidate."""
    return lambda: {name: measure()}


def timed(
    run: Callable[[], object], scale: float = 1e3, clock: Callable[[], float] = time.perf_counter
) -> Callable[[], float]:
    """A measurement of the time of one call, in 1 / `scale` seconds."""

    def measure() -> float:
        began = clock()
        run()
        return scale * (clock() - began)

    return measure


def speed(
    run: Callable[[], int], clock: Callable[[], float] = time.perf_counter
) -> Callable[[], float]:
    """A measurement of images per second of a call that returns its number of images."""

    def measure() -> float:
        began = clock()
        images = run()
        return images / (clock() - began)

    return measure


def in_turn(
    turns: Iterable[Turn],
    rounds: int,
    seconds: float = math.inf,
    least: int = 3,
    *,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Take all turns in rounds. Return the values of each candidate, round by round.

    Args:
        turns: The turns of a round.
        rounds: Largest number of rounds.
        seconds: After this time no further round begins.
        least: Number of rounds that are measured even if this takes longer.
        warm_up: Whether a first round does not count. It fills caches and imports modules.
    """
    turns = list(turns)
    for turn in turns if warm_up else ():
        turn()
    ends = time.perf_counter() + seconds
    values: dict[str, list[float]] = {}
    for number in range(rounds):
        if number >= least and time.perf_counter() > ends:
            break
        for turn in turns:
            for name, value in turn().items():
                values.setdefault(name, []).append(value)
    return values


def missing(package: str) -> str:
    """The name of a package if it is not installed, otherwise "". `package` can be one of its modules."""
    name = package.partition(".")[0]
    return "" if importlib.util.find_spec(name) else name
