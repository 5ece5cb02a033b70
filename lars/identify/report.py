"""The report of a verdict as text and as JSON."""

from __future__ import annotations

import math
from typing import Any

from lars.identify.compare import ALL_DIGITS, Match
from lars.identify.verdict import NEAREST, Verdict, exclusions, extra_options

FEW = 3  # so many differing tensors are named in the headline


def headline(verdict: Verdict) -> str:
    """The answer in one or two sentences."""
    best, path = verdict.best, verdict.candidate.path
    if best.first is not None:
        words = f"{path} is none of the named rules. The nearest is {best.reference.name}"
        words += f" ({best.agreeing} of {best.total} moves agree). They part {best.first.text}."
        if len(best.tensors) <= FEW:
            words += f" They differ only in {' and '.join(f'`{name}`' for name in best.tensors)}."
        return words
    words = f"{path} equals {best.reference.name}: all moves agree to {digits(best)}"
    if not verdict.lr_zero:
        return f"{words}."
    words += ", if the learning rate starts above 0"
    if verdict.equal:
        return f"{words}. A first step at lr 0 {verdict.lr_zero}, as in published code; the form here avoids this."
    return f"{words}. They differ in a first step at lr 0: the class {verdict.lr_zero}."


def digits(found: Match) -> str:
    """The number of agreeing digits in words."""
    if found.digits >= ALL_DIGITS:
        return f"{ALL_DIGITS} digits (up to rounding)"
    return f"{math.floor(found.digits)} digits"


def text_of(verdict: Verdict, all_rows: bool = False) -> str:
    """The report as text.

    Args:
        verdict: The verdict.
        all_rows: Whether the table has every rule, and not only the nearest ones.
    """
    lines = [headline(verdict)]
    best = verdict.best if verdict.best.equal else verdict.composed
    if best is not None:
        code = best.reference.call(extra_options(best))
        same = "In this library" if verdict.best.equal else "It equals a rule with these options"
        lines += ["", f"{same}: {code}"]
    elif not verdict.best.equal:
        lines += ["", "No other options of LARS or LAMB equal it either."]
    if best is not None:
        lines += [f"  {words}" for words in exclusions(best)]
    hyper = ", ".join(f"{name}={value}" for name, value in verdict.hyper.items())
    lines += ["", f"Its hyper-parameters, used for all rules: {hyper or 'none found'}"]
    lines += ["", *table(verdict.matches if all_rows else verdict.matches[:NEAREST])]
    if not all_rows and len(verdict.matches) > NEAREST:
        lines.append(
            f"... and {len(verdict.matches) - NEAREST} rules that agree less (--all shows them)"
        )
    lines += ["", "Measured properties:"]
    width = max(len(name) for name, _ in verdict.findings.lines)
    lines += [f"  {name:{width}}  {sentence}" for name, sentence in verdict.findings.lines]
    return "\n".join(lines)


def table(matches: list[Match]) -> list[str]:
    """A row for each rule: its name, the agreeing digits and moves, and the first difference."""
    rows = [("rule", "digits", "moves", "first difference")]
    for found in matches:
        where = found.first.text.removeprefix("at ") if found.first else "none"
        moves = f"{found.agreeing}/{found.total}"
        rows.append((found.reference.name, f"{math.floor(found.digits)}", moves, where))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return [
        "  ".join([f"{row[i]:{widths[i]}}" for i in range(3)] + [row[3]]).rstrip() for row in rows
    ]


def json_of(verdict: Verdict) -> dict[str, Any]:
    """The report as plain values."""
    equal = verdict.best if verdict.best.equal else verdict.composed
    return {
        "class": verdict.candidate.path,
        "equal": verdict.equal,
        "rule": verdict.best.reference.name,
        "digits": verdict.best.digits,
        "verdict": headline(verdict),
        "lr_zero": verdict.lr_zero,
        "same_as": equal.reference.call(extra_options(equal)) if equal else None,
        "exclusions": exclusions(equal or verdict.best),
        "hyper_parameters": verdict.hyper,
        "rules": [row(found) for found in verdict.matches],
        "properties": dict(verdict.findings.lines),
    }


def row(found: Match) -> dict[str, Any]:
    """A row of the table as plain values."""
    first = found.first
    part = None
    if first is not None:
        ratio = first.ratio if math.isfinite(first.ratio) else None
        part = {"step": first.step + 1, "tensor": first.tensor, "ratio": ratio, "text": first.text}
    return {
        "rule": found.reference.name,
        "digits": found.digits,
        "agreeing_moves": found.agreeing,
        "moves": found.total,
        "first_difference": part,
    }
