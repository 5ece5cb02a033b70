"""The comparison of two optimizers: how many digits of their moves agree, and where they first differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lars.identify.references import Reference, Treatment
from lars.identify.trial import LAYERS, RATES, Layer, Moves, phase, weights_and_gradients

EQUAL_DIGITS = 6  # Lamb of timm agrees to 7, because its clipping adds no 1e-6 to the norm
ALL_DIGITS = 16
PLAIN: Treatment = (False, True)
UNDECAYED: Treatment = (False, False)
FULL: Treatment = (True, True)
# How a rule may treat each kind of tensor without being another rule. The first that agrees is reported.
TREATMENTS: dict[str, tuple[Treatment, ...]] = {
    "ordinary": (FULL,),
    "1-D": (FULL, UNDECAYED, PLAIN, (True, False)),
    "undecayed": (FULL, PLAIN),
    "undecayed 1-D": (FULL, PLAIN),
    "flagged": (UNDECAYED, PLAIN, FULL, (True, False)),
}
FULL_OR_BARE: tuple[Treatment, ...] = (FULL, (True, False))  # of a rule without a trust ratio
EXCLUDED = (UNDECAYED, PLAIN)  # of flagged tensors, if the optimizer declares the flag


@dataclass(frozen=True)
class Difference:
    """The first step and tensor where two optimizers differ.

    Attributes:
        step: The step, from 0.
        when: The step in words.
        tensor: The name of the first tensor that differs in this step.
        others: How many other tensors differ in this step.
        ratio: The length of the candidate's move divided by that of the rule.
        text: A sentence.
    """

    step: int
    when: str
    tensor: str
    others: int
    ratio: float
    text: str


@dataclass(frozen=True)
class Match:
    """How well a rule describes the candidate.

    Attributes:
        reference: The rule.
        digits: Agreeing digits of the worst move.
        agreeing: Number of moves that agree to `EQUAL_DIGITS` digits.
        total: Number of moves.
        closeness: Mean number of agreeing digits, where each move counts at most `EQUAL_DIGITS`. It ranks the rules.
        tensors: The tensors that differ in some step.
        treatments: The treatment of each kind of tensor that agrees best.
        first: Where they first differ; None if the rule equals the candidate.
    """

    reference: Reference
    digits: float
    agreeing: int
    total: int
    closeness: float
    tensors: list[str]
    treatments: dict[str, Treatment]
    first: Difference | None

    @property
    def equal(self) -> bool:
        """Whether the candidate follows the rule."""
        return self.first is None


def digits_of(own: Tensor, other: Tensor, weight_norm: float) -> float:
    """The number of decimal digits to which two moves agree, from 0 to 16.

    Args:
        own: The move of the candidate.
        other: That of the rule.
        weight_norm: ‖w‖ at the start. Differences of the size of its rounding error count as none.
    """
    difference = float((own - other).norm())
    if not math.isfinite(difference):
        return 0.0
    size = max(float(own.norm()), float(other.norm()))
    if difference <= 8 * torch.finfo(torch.float64).eps * max(weight_norm, size):
        return float(ALL_DIGITS)
    return min(max(-math.log10(difference / size), 0.0), float(ALL_DIGITS))


def match(
    candidate: Moves,
    reference: Reference,
    *,
    decays: bool = True,
    flags_known: bool = False,
    alike: bool = False,
    rates: Sequence[float] = RATES,
) -> Match:
    """Compare a candidate with a rule.

    Args:
        candidate: Its moves.
        reference: The rule.
        decays: Whether the candidate has weight decay at all.
        flags_known: Whether it declares a flag that excludes a group, so that it must obey it.
        alike: Whether to assume that the candidate treats all tensors alike, which is faster.
        rates: The learning rate of each step.
    """
    allowed = allowed_treatments(reference, flags_known, alike)
    needed = sorted({treatment for some in allowed.values() for treatment in some})
    moves = {t: reference.moves(t, decays, rates) for t in needed}
    weights, _ = weights_and_gradients()
    norms = {name: float(weight.norm()) for name, weight in weights.items()}

    def digits(layer: Layer, treatment: Treatment, step: int) -> float:
        own, other = candidate[step][layer.name], moves[treatment][step][layer.name]
        if documented(reference, layer, own):
            return float(ALL_DIGITS)
        return digits_of(own, other, norms[layer.name])

    steps = range(len(rates))
    treatments: dict[str, Treatment] = {}
    cells: dict[tuple[int, str], float] = {}
    for kind, choices in allowed.items():
        layers = [layer for layer in LAYERS if layer.kind == kind]
        table = {t: {(s, x.name): digits(x, t, s) for x in layers for s in steps} for t in choices}
        treatments[kind] = max(choices, key=lambda t: (agreeing(table[t]), min(table[t].values())))
        cells |= table[treatments[kind]]
    kinds = {layer.name: layer.kind for layer in LAYERS}
    bad = sorted(cell for cell, value in cells.items() if value < EQUAL_DIGITS)
    first = None
    if bad:
        step = bad[0][0]
        names = [name for at, name in bad if at == step]
        pairs = {
            name: (candidate[step][name], moves[treatments[kinds[name]]][step][name])
            for name in names
        }
        first = first_difference(step, pairs, rates)
    differing = {name for _, name in bad}
    tensors = [layer.name for layer in LAYERS if layer.name in differing]
    closeness = sum(min(value, EQUAL_DIGITS) for value in cells.values()) / len(cells)
    worst, count = min(cells.values()), agreeing(cells)
    return Match(reference, worst, count, len(cells), closeness, tensors, treatments, first)


def allowed_treatments(
    reference: Reference, flags_known: bool, alike: bool
) -> dict[str, tuple[Treatment, ...]]:
    """The treatments of each kind of tensor that `match` tries; it has the same arguments."""
    if alike:
        return dict.fromkeys(TREATMENTS, (FULL,))
    if not reference.has_ratio:  # it can only leave out weight decay
        bare = {kind: FULL_OR_BARE for kind in ("1-D", "flagged")}
        return dict.fromkeys(TREATMENTS, (FULL,)) | bare
    return TREATMENTS | ({"flagged": EXCLUDED} if flags_known else {})


def agreeing(cells: dict[tuple[int, str], float]) -> int:
    """How many moves agree."""
    return sum(value >= EQUAL_DIGITS for value in cells.values())


def documented(reference: Reference, layer: Layer, own: Tensor) -> bool:
    """Whether a rule deliberately differs here from published code: 0 / 0 is 0 in ``cmpark``, and not nan."""
    published_nan = str(reference.options.get("form", "")).startswith("cmpark")
    return published_nan and layer.name == "dead.weight" and bool(own.isnan().all())


def first_difference(
    step: int, pairs: dict[str, tuple[Tensor, Tensor]], rates: Sequence[float]
) -> Difference:
    """Describe the first of the tensors that differ in a step.

    Args:
        step: The step, from 0.
        pairs: The differing moves of this step by tensor: that of the candidate, and that of the rule.
        rates: The learning rate of each step.
    """
    name = next(layer.name for layer in LAYERS if layer.name in pairs)
    own, other = pairs[name]
    length, expected = float(own.norm()), float(other.norm())
    ratio = length / expected if expected else math.inf
    when = phase(step, rates)
    text = f"at {when}, tensor `{name}` {words_for(own, other)}"
    others = len(pairs) - 1
    if others:
        text += (
            f"; {others} other tensor{'s differ' if others > 1 else ' differs'} in this step too"
        )
    return Difference(step, when, name, others, ratio, text)


def words_for(own: Tensor, other: Tensor) -> str:
    """How a move differs from that of the rule."""
    length, expected = float(own.norm()), float(other.norm())
    if not math.isfinite(length):
        return "becomes nan or infinite"
    if not expected:
        return f"moves by {length:.3g}, and the rule leaves it as it is"
    if not length:
        return "does not move, and the rule moves it"
    cosine = float((own * other).sum()) / (length * expected)
    angle = math.degrees(math.acos(min(max(cosine, -1.0), 1.0)))
    turned = f" and in another direction ({angle:.3g} degrees)" if angle > 0.1 else ""
    ratio = length / expected
    if turned and abs(ratio - 1) < 0.005:
        return f"moves as far, but in another direction ({angle:.3g} degrees)"
    precise = f"{ratio:.3g}" if abs(ratio - 1) > 0.005 else f"{ratio:.8g}"
    return f"moves {precise} times as far{turned}"
