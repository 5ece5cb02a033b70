"""The learning rate over the run as text: its value at the corners, one line of bars, or a small plot."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

from lars.config.plan import Plan

_BLOCKS, _PLAIN = " ▁▂▃▄▅▆▇█", " ..::-=##"


def corners(lr_at: Callable[[int], float], plan: Plan) -> str:
    """The learning rate at step 0, at the end of warm-up, in the middle of the run, and at the last step.

    Example:
        ``step 0: 0, step 785: 17 (end of warm-up), step 3454: 5.4 (middle), step 6907: 0.0001 (last)``
    """
    last = plan.total_steps - 1
    names = {0: "", last // 2: " (middle)"}
    if 0 < plan.warmup_steps <= last:
        names[math.ceil(plan.warmup_steps)] = " (end of warm-up)"
    names[last] = " (last)"
    return ", ".join(f"step {step}: {lr_at(step):.4g}{names[step]}" for step in sorted(names))


def sparkline(lr_at: Callable[[int], float], plan: Plan, width: int = 60) -> str:
    """One line of bars from the first step to the last."""
    return _bars(_samples(lr_at, plan, width), height=1)[0]


def plot(lr_at: Callable[[int], float], plan: Plan, width: int = 60, height: int = 8) -> list[str]:
    """A small plot with axes.

    Args:
        lr_at: Learning rate as a function of the optimizer step, from 0.
        plan: The plan of the run, which gives the steps and epochs.
        width: Columns of the plot, without the axis.
        height: Lines of the plot, without the axis.

    Returns:
        The lines of the plot. They use block characters if the standard output can show them.
    """
    values = _samples(lr_at, plan, width)
    top = f"{max(values):.4g}"
    margin = len(top)
    labels = [top, *[""] * (height - 2), "0"]
    lines = [
        f"{label:>{margin}} |{bars}"
        for label, bars in zip(labels, _bars(values, height), strict=True)
    ]
    epochs = f"{plan.total_steps / plan.steps_per_epoch:g}"
    axis = "epoch 0".ljust(width - len(epochs)) + epochs
    return [*lines, f"{'':{margin}} +{'-' * width}", f"{'':{margin}}  {axis}"]


def _samples(lr_at: Callable[[int], float], plan: Plan, width: int) -> list[float]:
    """The highest rate in each of `width` equal parts of the run, of up to 5 of its steps and the end of warm-up."""
    last, warm = plan.total_steps - 1, math.ceil(plan.warmup_steps)
    values = []
    for column in range(width):
        first, end = column * last / width, (column + 1) * last / width
        steps = {round(first + (end - first) * i / 4) for i in range(5)}
        values.append(max(map(lr_at, steps | ({warm} if first <= warm <= end else set()))))
    return values


def _bars(values: list[float], height: int) -> list[str]:
    """Bars of `height` lines, from the top line to the bottom one."""
    signs = _BLOCKS if _shows_blocks() else _PLAIN
    greatest = max(values) or 1.0
    eighths = [math.ceil(8 * height * value / greatest) for value in values]
    return [
        "".join(signs[min(8, max(0, bar - 8 * line))] for bar in eighths).rstrip()
        for line in reversed(range(height))
    ]


def _shows_blocks() -> bool:
    try:
        _BLOCKS.encode(sys.stdout.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True
