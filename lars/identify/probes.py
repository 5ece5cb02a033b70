"""The properties of an optimizer one by one: the denominator, the momentum buffer, bounds, and zero norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lars.identify.candidate import Candidate
from lars.identify.measure import (
    DECAY,
    DENOMINATORS,
    FIRST,
    SECOND,
    TINY,
    WEIGHT,
    Bench,
    Ratio,
    direction,
    is_sgd_like,
)
from lars.identify.trial import SLIGHT_DECAY, rounded, take_step

HARMLESS = "harmless"


@dataclass
class Findings:
    """What the probes measured. `options` are those of `lars.LARS`; `lines` are (property, sentence)."""

    options: dict[str, Any]
    lines: list[tuple[str, str]]
    sgd_like: bool = True

    def add(self, name: str, sentence: str, **options: Any) -> None:
        """Note a property, and what it means as options."""
        self.lines.append((name, sentence))
        self.options |= options


def probe(candidate: Candidate, hyper: dict[str, Any]) -> Findings:
    """Measure the properties of an optimizer one by one.

    Args:
        candidate: The class.
        hyper: Its hyper-parameters.
    """
    found = Findings({}, [])
    bench = Bench(candidate, hyper.get("momentum", 0.0))
    if not is_sgd_like(bench):
        found.sgd_like = False
        found.add("update", "not a multiple of the gradient and the weight, as in Adam and LAMB")
        gradient_change(bench, found)
        return found
    ratio = Ratio.measured(bench)
    ratio_findings(bench, ratio, hyper, found)
    if ratio.kind is not None:
        bound_findings(bench, ratio, found)
        time_findings(bench, found)
    decay_findings(bench, ratio, found)
    zero_findings(bench, ratio, found)
    element_bound(bench, ratio, found)
    if bench.momentum:
        momentum_findings(bench, ratio, found)
    gradient_change(bench, found)
    return found


def ratio_findings(bench: Bench, ratio: Ratio, hyper: dict[str, Any], found: Findings) -> None:
    """Denominator, trust coefficient and eps, and whether groups without weight decay have a ratio."""
    if ratio.kind is None:
        found.add("trust ratio", "none: the move is lr times the gradient", adapt=False)
        return
    if ratio.kind == "unknown":
        found.add("trust ratio", "it depends on the norms in a way that no form has")
        return
    coefficient, eps = (
        as_read(value, hyper.get(name))
        for name, value in (("trust_coefficient", ratio.coefficient), ("eps", ratio.eps))
    )
    words = f"{DENOMINATORS[ratio.kind]} + eps; trust coefficient {coefficient:g}, eps {eps:g}"
    kind = "split" if ratio.kind == "gradient" else ratio.kind
    found.add("denominator", words, denominator=kind, trust_coefficient=coefficient, eps=eps)
    for name, value in (("trust_coefficient", coefficient), ("eps", eps)):
        if hyper.get(name, value) != value:
            sentence = f"its option is {hyper[name]:g}, and the first step uses {value:g}"
            found.add(name.replace("_", " "), sentence)
    found.add(
        "bound by lr",
        "min(ratio, lr) / lr, as in LARC" if ratio.clipped else "none",
        trust_clip=ratio.clipped,
    )
    without = bench.first_move(1.0, 2.0, decay=0.0)[0]
    adapts = not math.isclose(without, 1.0, rel_tol=1e-9)
    sentence = "have a trust ratio too" if adapts else "have no trust ratio"
    found.add("groups without weight decay", sentence)


def as_read(measured: float, read: Any) -> float:
    """The value that was read if the measured one equals it up to rounding, or else the measured one."""
    if isinstance(read, int | float) and math.isclose(measured, read, rel_tol=1e-3, abs_tol=1e-12):
        return float(read)
    return rounded(measured)


def bound_findings(bench: Bench, ratio: Ratio, found: Findings) -> None:
    """The upper bound of the ratio, and of the norms in it."""
    if ratio.kind == "unknown":
        return
    norms = (1.0, 1e-9)
    value, expected = bench.first_move(*norms, decay=TINY)[0], ratio.expected(*norms, TINY)
    if ratio.clipped:
        found.add("bound of the ratio", "by lr only", max_ratio=None)
    elif value < 0.99 * expected:
        bound = rounded(value)
        found.add("bound of the ratio", f"{bound:g}", max_ratio=bound)
    else:
        found.add("bound of the ratio", "none", max_ratio=None)
    value = bench.first_move(1000.0, 1.0, decay=TINY)[0]
    weight_bound = 1000.0 * value / ratio.expected(1000.0, 1.0, TINY)
    if weight_bound < 990 and not found.options["max_ratio"] and not ratio.clipped:
        found.add("bound of ‖w‖ in the ratio", f"{rounded(weight_bound):g}")


def time_findings(bench: Bench, found: Findings) -> None:
    """Whether the ratio changes with the number of steps, as in TVLARS."""
    lr = 1e-6  # the weight, and thus its norm, hardly changes
    moves = bench.moves(2 * direction(WEIGHT), [direction(FIRST)] * 3, [lr] * 3, DECAY)
    one, _, three = (float((move * direction(FIRST)).sum()) for move in moves)
    same = math.isclose(one, three, rel_tol=1e-5)
    words = "the ratio does not depend on it"
    if not same:
        words = f"the ratio of the third step is {three / one:.6g} times that of the first"
    found.add("number of steps", words)


def decay_findings(bench: Bench, ratio: Ratio, found: Findings) -> None:
    """Whether weight decay is multiplied by the ratio."""
    along_g, along_w = bench.first_move(2.0, 1.0)
    if not along_w:
        found.add("weight decay", "none")
    elif math.isclose(along_w, along_g * DECAY, rel_tol=1e-6):
        words = "added to the gradient" + (" before the ratio" if ratio.kind else "")
        found.add("weight decay", words)
    elif math.isclose(along_w, DECAY, rel_tol=1e-6):
        found.add("weight decay", "outside the ratio: w is multiplied by 1 - lr weight_decay")
    else:
        found.add("weight decay", f"another rule: the decay moves w by {along_w:.3g} lr")


def zero_findings(bench: Bench, ratio: Ratio, found: Findings) -> None:
    """What happens where ‖w‖ or ‖g‖ is 0."""
    zero_weight, _ = bench.first_move(0.0, 1.0)
    _, zero_gradient = bench.first_move(2.0, 0.0)
    zero = torch.zeros(4, 4, dtype=torch.float64)
    (both,) = bench.moves(zero, [zero], [1.0], DECAY)
    one, none = math.isclose(zero_weight, 1.0, rel_tol=1e-6), abs(zero_weight) < TINY
    words = "moves by lr g (ratio 1)" if one else "does not move (ratio 0)" if none else ""
    found.add("zero weight", words or f"ratio {zero_weight:.3g}")
    decays = math.isclose(zero_gradient, DECAY, rel_tol=1e-6)
    still = abs(zero_gradient) < TINY
    words = "decays at the full lr (ratio 1)" if decays else "does not move" if still else ""
    words = words or f"decays with the ratio {zero_gradient / DECAY:.3g}"
    found.add("zero gradient", words)
    found.add("both zero", "becomes nan" if bool(both.isnan().any()) else "stays 0")
    if ratio.kind is not None:
        found.options["zero_norm"] = "one" if decays else "raw" if one and still else "formula"


def element_bound(bench: Bench, ratio: Ratio, found: Findings) -> None:
    """Whether the elements of the gradient, or of the gradient plus weight decay, are bounded."""
    if ratio.kind == "unknown":
        return
    weight, large = 2 * direction(WEIGHT), 2000 * direction(FIRST) + 2 * direction(SECOND)
    (move,) = bench.moves(weight, [large], [1.0], SLIGHT_DECAY)
    unit = (
        float((move * direction(SECOND)).sum()) / 2
    )  # the move of an element divided by its gradient
    seen = float((move * direction(FIRST)).sum()) / (2 * unit) if unit else 2000.0
    if seen > 999:
        found.add("bound of elements", "none", max_element=None)
        return
    bound = rounded(seen)
    heavy = 4 * bound / DECAY * direction(WEIGHT)  # its decay is twice the bound per element
    (move,) = bench.moves(heavy, [2 * direction(SECOND)], [1.0], DECAY)
    unit = float((move * direction(SECOND)).sum()) / 2
    decayed = float((move * direction(WEIGHT)).sum()) / (2 * unit) if unit else 0.0
    if math.isclose(decayed, bound, rel_tol=1e-4):
        words = f"{bound:g}, after weight decay is added"
        found.add("bound of elements", words, max_element=bound)
    else:
        found.add("bound of elements", f"{bound:g}, before weight decay is added", max_element=None)


def momentum_findings(bench: Bench, ratio: Ratio, found: Findings) -> None:
    """What is inside the momentum buffer, its first step, Nesterov, and a first step at lr 0."""
    m, norms = bench.momentum, (1.0, 3.0)
    # The weight must hardly move, because the ratio depends on its norm. A ratio that lr bounds needs an lr of 1.
    largest = 1.0 if ratio.clipped else min(1.0, 1e-3 / bench.first_move(2.0, 1.0, momentum=0.0)[0])
    rates = (largest, largest / 2)
    grads = [norm * direction(row) for norm, row in zip(norms, (FIRST, SECOND), strict=True)]
    weight = 2 * direction(WEIGHT)
    used = m if ratio.kind == "momentum" else 0.0
    r1, r2 = (
        bench.first_move(2.0, norm, SLIGHT_DECAY, momentum=used, lr=lr)[0]
        for norm, lr in zip(norms, rates, strict=True)
    )
    one, two = bench.moves(weight, grads, rates, SLIGHT_DECAY, m)
    a, b = rates
    start = float((one * direction(FIRST)).sum()) / (a * r1)
    later = float((two * direction(SECOND)).sum()) / (3 * b * r2)
    kept = float((two * direction(FIRST)).sum())
    nesterov = math.isclose(later, 1 + m, rel_tol=1e-3)
    found.add("Nesterov", "yes" if nesterov else "no", nesterov=nesterov)
    plain = 1 + m if nesterov else 1.0
    if not math.isclose(start, plain, rel_tol=1e-3):
        found.add("first step", f"{start / plain:.4g} times a step of the formula")
    if not math.isclose(later, plain, rel_tol=1e-3):
        found.add("later steps", f"the new gradient enters with the factor {later / plain:.4g}")
    share = kept / (m * m if nesterov else m)
    share /= start / plain
    values = {"both": a * r1, "ratio": b * r1, "none": b * r2, "lr": a * r2}
    words = {
        "both": "lr and ratio",
        "ratio": "the ratio; lr is applied after it",
        "none": "nothing; ratio and lr of the current step multiply it",
        "lr": "lr; the ratio of the current step multiplies it",
    }
    if ratio.kind is None:
        words |= {"both": "lr", "ratio": "nothing; lr is applied after it"}
    for name, value in values.items():
        if math.isclose(share, value, rel_tol=1e-2):
            found.add("inside the momentum buffer", words[name], inside=name)
            break
    else:
        found.add("inside the momentum buffer", "not as in any form")
    lr_zero(bench, found)


def lr_zero(bench: Bench, found: Findings) -> None:
    """Whether a first step at lr 0, as warm-up from 0 makes it, leaves an unscaled gradient behind."""
    weight, grads = 2 * direction(WEIGHT), [direction(FIRST), 3 * direction(SECOND)]
    try:
        after_zero = bench.moves(weight, grads, [0.0, 1.0], SLIGHT_DECAY, bench.momentum)
    except Exception as error:
        found.add("first step at lr 0", f"raises {type(error).__name__}: {error}")
        return
    usual = bench.moves(weight, grads, [1.0, 1.0], SLIGHT_DECAY, bench.momentum)
    if not after_zero[0].isfinite().all() or not after_zero[1].isfinite().all():
        found.add("first step at lr 0", "makes the weight nan or infinite")
        return
    kept, normal = (float((x[1] * direction(FIRST)).sum()) for x in (after_zero, usual))
    if abs(kept) > 10 * abs(normal):
        times = f"{kept / normal:.3g} times as large as usual" if normal else "of full size"
        found.add("first step at lr 0", f"puts a gradient {times} into the momentum buffer")
    else:
        found.add("first step at lr 0", HARMLESS)


def gradient_change(bench: Bench, found: Findings) -> None:
    """Whether a step overwrites p.grad."""
    param = nn.Parameter(2 * direction(WEIGHT))
    param.grad = direction(FIRST)
    group = {"params": [param], "weight_decay": DECAY}
    take_step(bench.candidate.create([group], momentum=bench.momentum), 0.5)
    same = param.grad is not None and torch.equal(param.grad, direction(FIRST))
    found.add("p.grad", "unchanged" if same else "overwritten by the step")
