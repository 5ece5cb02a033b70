"""A row of the table: what was tried, what was measured, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass

OK, SLOW, FAILED, NOT_TESTED = "ok", "slow", "failed", "not tested"


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Attributes:
        what: What was tried.
        verdict: `OK`, `SLOW`, `FAILED` or `NOT_TESTED`.
        value: The measured number. None if nothing was measured.
        unit: Its unit.
        low: Values below this are slow. None: there is no such limit.
        high: The best published value. None: there is none.
        note: Further facts, the cause of a failure, or how to fix it.
    """

    what: str
    verdict: str
    value: float | None = None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    note: str = ""


def measured(
    what: str,
    value: float,
    unit: str,
    *,
    low: float | None = None,
    high: float | None = None,
    note: str = "",
) -> Row:
    """A row with a number, judged by its limits.

    Example:
        >>> measured("copy", 90.0, "GB/s", low=100.0).verdict
        'slow'
    """
    verdict = SLOW if low is not None and value < low else OK
    return Row(what, verdict, value, unit, low, high, note)


def not_tested(what: str, why: str) -> Row:
    """A row about something that is missing here. `why` also names the fix."""
    return Row(what, NOT_TESTED, note=why)


def failed(what: str, why: str) -> Row:
    """A row about something that does not work."""
    return Row(what, FAILED, note=why)
