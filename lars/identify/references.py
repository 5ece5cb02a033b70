"""The named rules: every form of LARS and LAMB, TVLARS, the wrapper, and torch's own optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from lars.identify.trial import RATES, Moves, moves_of
from lars.names import LAMB_FORMS, LARS_FORMS
from lars.optim import LAMB, LARS, TVLARS, LARSWrapper

Treatment = tuple[bool, bool]  # whether a tensor has a trust ratio, and whether it has weight decay


@dataclass(frozen=True)
class Reference:
    """A rule with the hyper-parameters of the candidate.

    Attributes:
        name: Its name in reports.
        cls: Its class.
        options: The arguments of its constructor besides parameters and lr.
        wraps: The class of the wrapped optimizer, for the wrapper.
        inner_options: The arguments of the wrapped optimizer.
    """

    name: str
    cls: type[Optimizer]
    options: dict[str, Any]
    wraps: type[Optimizer] | None = None
    inner_options: dict[str, Any] | None = None

    @property
    def has_ratio(self) -> bool:
        """Whether it has a trust ratio."""
        return self.cls in (LARS, LAMB, TVLARS, LARSWrapper)

    @property
    def clips_to_lr(self) -> bool:
        """Whether its ratio is min(ratio, lr) / lr, where it deliberately differs from published code at lr 0."""
        form = LARS_FORMS.get(self.options.get("form", ""), {})
        return bool(self.options.get("trust_clip", form.get("trust_clip", False)))

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Create the optimizer."""
        if self.wraps is not None:
            inner = self.wraps(groups, lr=0.5, **(self.inner_options or {}))  # type: ignore[call-arg]
            return self.cls(inner, **self.options)  # type: ignore[arg-type]
        return self.cls(groups, lr=0.5, **self.options)  # type: ignore[call-arg]

    def moves(self, treatment: Treatment, decays: bool, rates: Sequence[float] = RATES) -> Moves:
        """Its moves if all tensors have this treatment.

        Args:
            treatment: Whether tensors have a trust ratio, and weight decay.
            decays: Whether the candidate has weight decay at all.
            rates: The learning rate of each step.
        """
        adapted, decayed = treatment

        def build(groups: list[dict[str, Any]]) -> Optimizer:
            decay = decays and decayed
            return self.build(
                [
                    {
                        "params": group["params"],
                        "weight_decay": group["weight_decay"] if decay else 0.0,
                        "adapt": adapted,
                    }
                    for group in groups
                ]
            )

        return moves_of(build, rates)

    def call(self, extra: dict[str, Any]) -> str:
        """The code that creates it, with further options."""
        words = [f"{name}={value!r}" for name, value in (self.options | extra).items()]
        words = [word for word in words if word not in ("path='foreach'", "nesterov=False")]
        if self.wraps is not None:
            words = [f"{self.wraps.__name__}(...)", *words]
        return f"{self.cls.__name__}({', '.join(words)})"


def references(hyper: dict[str, Any], wraps: type | None = None) -> list[Reference]:
    """All rules, with the hyper-parameters that the candidate has.

    Args:
        hyper: Hyper-parameters by the names of `lars.identify.candidate.ALIASES`.
        wraps: The optimizer that the candidate wraps.
    """
    found = [lars_reference({"form": form}, hyper) for form in LARS_FORMS]
    if "trust_clip" not in hyper:  # clip=False of apex, and the rule of bolts
        found.append(lars_reference({"form": "larc", "trust_clip": False}, hyper))
    shared = {"momentum": hyper.get("momentum", 0.0)}
    tv_names = ("trust_coefficient", "lmbda")
    tvlars = shared | {name: hyper[name] for name in tv_names if name in hyper}
    found.append(Reference("tvlars", TVLARS, tvlars | {"path": "foreach"}))
    adam: dict[str, Any] = {name: hyper[name] for name in ("betas", "eps") if name in hyper}
    found += [lamb_reference({"form": form}, hyper) for form in LAMB_FORMS]
    if wraps not in (None, torch.optim.SGD):
        inner = adam if wraps in (torch.optim.Adam, torch.optim.AdamW) else {}
        names = {"trust_coefficient": "trust_coef", "eps": "eps"}
        own = {ours: hyper[name] for name, ours in names.items() if name in hyper}
        found.append(Reference(f"wrapper around {wraps.__name__}", LARSWrapper, own, wraps, inner))
    sgd = shared | {
        "nesterov": bool(hyper.get("nesterov", False) and shared["momentum"]),
        "dampening": hyper.get("dampening", 0.0),
    }
    eps = {"eps": hyper["eps"]} if "eps" in hyper else {}
    torch_rules: list[tuple[type[Optimizer], dict[str, Any]]] = [
        (torch.optim.SGD, sgd),
        (torch.optim.Adam, adam),
        (torch.optim.AdamW, adam),
        (torch.optim.Adagrad, eps),
        (torch.optim.RMSprop, eps | shared),
    ]
    return found + [Reference(cls.__name__.lower(), cls, options) for cls, options in torch_rules]


def lars_reference(options: dict[str, Any], hyper: dict[str, Any]) -> Reference:
    """A rule of `LARS`: the options that define it, and the hyper-parameters of the candidate."""
    names = ("momentum", "trust_coefficient", "eps", "trust_clip")
    read = {name: hyper[name] for name in names if name in hyper}
    read["nesterov"] = bool(hyper.get("nesterov", False) and hyper.get("momentum", 0.0))
    shown = [f"{name}={value!r}" for name, value in options.items() if name != "form"]
    name = ", ".join([f"lars {options['form']}", *shown]) if "form" in options else "lars"
    return Reference(name, LARS, read | options | {"path": "foreach"})


def lamb_reference(options: dict[str, Any], hyper: dict[str, Any]) -> Reference:
    """A rule of `LAMB`, like `lars_reference`."""
    read = {name: hyper[name] for name in ("betas", "eps") if name in hyper}
    name = f"lamb {options['form']}" if "form" in options else "lamb"
    return Reference(name, LAMB, read | options | {"path": "foreach"})
