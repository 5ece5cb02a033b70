"""The comparison of a candidate with all rules, and the rule that describes it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lars.errors import UsageError
from lars.identify.candidate import Candidate, hyper_parameters, known_flags
from lars.identify.compare import FULL, PLAIN, UNDECAYED, Match, match
from lars.identify.probes import HARMLESS, Findings, probe
from lars.identify.references import Reference, lamb_reference, lars_reference, references
from lars.identify.trial import (
    FLAGS,
    RATES,
    RATES_ABOVE_ZERO,
    Moves,
    groups_of,
    moves_of,
    weights_and_gradients,
)

LAMB_OPTIONS: dict[str, tuple[Any, ...]] = {
    "bias_correction": (True, False),
    "max_grad_norm": (None, 1.0),
    "max_weight_norm": (None, 10.0),
    "max_ratio": (None, 1.0),
    "decoupled_weight_decay": (True, False),
}
MEASURED = ("trust_coefficient", "eps")  # used for all rules if the candidate has no such option
NEAREST = 6  # so many rules are compared in full
INSIDE = ("none", "ratio", "both")


@dataclass(frozen=True)
class Verdict:
    """What is known about a candidate.

    Attributes:
        candidate: The candidate.
        hyper: Its hyper-parameters, as far as they could be read.
        matches: The comparison with each named rule, the best first.
        composed: A rule with options of its own that equals the candidate where no named rule does.
        findings: The measured properties.
        rates: The learning rates of the comparison.
        lr_zero: What a first step at lr 0 does, if it alone makes the difference; empty otherwise.
        equal: Whether a named rule equals the candidate.
    """

    candidate: Candidate
    hyper: dict[str, Any]
    matches: list[Match]
    composed: Match | None
    findings: Findings
    rates: Sequence[float]
    lr_zero: str
    equal: bool

    @property
    def best(self) -> Match:
        """The rule that equals the candidate, or the nearest one."""
        return self.matches[0]


def identify(candidate: Candidate) -> Verdict:
    """Compare a candidate with all named rules.

    Raises:
        UsageError: The candidate cannot be created, or its step fails.
    """
    built = candidate.create(example_groups())
    hyper = hyper_parameters(built)
    from_zero, error = tried(candidate, RATES)
    above_zero, later_error = tried(candidate, RATES_ABOVE_ZERO)
    if above_zero is None:
        raise UsageError(
            f"{candidate.path}: its step() failed: {later_error}. identify calls step() without "
            "arguments; wrap the class in one whose step() needs none"
        )
    findings = probe(candidate, hyper)
    measured = {name: findings.options[name] for name in MEASURED if name in findings.options}
    rules = references(measured | hyper, candidate.wraps)
    options = {
        "decays": "weight_decay" in hyper,
        "flags_known": bool(known_flags(built, list(FLAGS))),
    }
    zero_step = dict(findings.lines).get("first step at lr 0", HARMLESS)
    zero_step = f"raises {error}" if error else zero_step
    moves, rates, lr_zero = from_zero or above_zero, RATES, ""
    matches = ranked(moves, rules, rates, options) if from_zero else []
    if zero_step != HARMLESS and not (matches and matches[0].equal):
        again = ranked(above_zero, rules, RATES_ABOVE_ZERO, options)
        if not matches or again[0].equal:
            moves, rates, matches, lr_zero = above_zero, RATES_ABOVE_ZERO, again, zero_step
    best = matches[0]
    equal = best.equal and (not lr_zero or best.reference.clips_to_lr)
    composed = None
    if not best.equal:
        others = ranked(moves, list(composable(findings, hyper)), rates, options)
        composed = others[0] if others and others[0].equal else None
    return Verdict(candidate, hyper, matches, composed, findings, rates, lr_zero, equal)


def example_groups() -> list[dict[str, Any]]:
    """The groups of the trial, to read the hyper-parameters of an optimizer."""
    weights, _ = weights_and_gradients()
    return groups_of({name: nn.Parameter(weight) for name, weight in weights.items()})


def tried(candidate: Candidate, rates: Sequence[float]) -> tuple[Moves | None, str]:
    """The moves of a candidate, or None and its error."""
    try:
        return moves_of(candidate.create, rates), ""
    except UsageError:
        raise
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def ranked(
    moves: Moves, rules: list[Reference], rates: Sequence[float], options: dict[str, Any]
) -> list[Match]:
    """The comparison with each rule, the best first.

    Only the nearest rules are compared with every treatment of excluded tensors, to save time.
    """

    def closeness(found: Match) -> tuple[bool, float]:
        return found.equal, found.closeness

    alike = [match(moves, rule, rates=rates, alike=True, **options) for rule in rules]
    alike.sort(key=closeness, reverse=True)
    near = [match(moves, m.reference, rates=rates, **options) for m in alike[:NEAREST]]
    return sorted(near, key=closeness, reverse=True) + alike[NEAREST:]


def composable(findings: Findings, hyper: dict[str, Any]) -> Iterator[Reference]:
    """Rules that are no named form, made from the measured options."""
    if not findings.sgd_like:
        for values in itertools.product(*LAMB_OPTIONS.values()):
            yield lamb_reference(dict(zip(LAMB_OPTIONS, values, strict=True)), hyper)
        return
    names = ("denominator", "inside", "max_ratio", "max_element", "zero_norm")
    measured = findings.options
    if "denominator" not in measured or measured.get("inside", "none") not in INSIDE:
        return
    options = {name: measured[name] for name in names if name in measured}
    own = (*MEASURED, "nesterov", "trust_clip")
    read = hyper | {name: measured[name] for name in own if name in measured}
    yield lars_reference(options, read)


def exclusions(found: Match) -> list[str]:
    """Which tensors the candidate treats differently from the ordinary ones, in words."""
    ratio = "no trust ratio" if found.reference.has_ratio else ""
    words = {
        UNDECAYED: " and ".join(filter(None, (ratio, "no weight decay"))),
        PLAIN: ratio,
        (True, False): "no weight decay",
    }
    names = {
        "1-D": "1-D tensors",
        "undecayed": "groups without weight decay",
        "flagged": "groups with an exclusion flag",
    }
    treatments = found.treatments
    return [
        f"{names[kind]} have {words[treatments[kind]]}"
        for kind in names
        if treatments[kind] != FULL and words[treatments[kind]]
    ]


def extra_options(found: Match) -> dict[str, Any]:
    """Options that the treatments of a LARS rule amount to."""
    without_ratio = found.treatments["undecayed"] == PLAIN and found.treatments["ordinary"] == FULL
    is_lars = found.reference.cls.__name__ == "LARS"
    return {"always_adapt": False} if without_ratio and is_lars else {}
