"""The update of SGD with momentum under a trust ratio, and three ways to carry it out.

A `Rule` holds the hyper-parameters of one parameter group and the arithmetic between norms and step:

    d = clamp(g + weight_decay * w, ±max_element)
    b = momentum * b + inside * d
    w = w - outside * b

where ratio and lr stand inside or outside the momentum buffer as the form says. Three functions apply a rule to lists of
tensors, and agree to rounding:

- `update_loop`: one tensor after the other, every formula written out. The reference, and the fallback for anything.
- `update_fused`: for the CPU. A tensor's norms are followed at once by torch's fused SGD kernel on the same tensor, while
  it is still in cache; the trust ratio rides in the kernel's ``lr`` or ``dampening``.
- `update_foreach`: for accelerators and `torch.compile`. Few launches, and nothing is read back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lars.optim import kernels
from lars.optim.trust import trust_ratio, trust_ratios

Factor = TypeVar("Factor", float, Tensor)


@dataclass(frozen=True, slots=True)
class Rule:
    """The hyper-parameters of one group; the names and meanings are those of `lars.LARS`."""

    lr: Any  # float, or 0-dim Tensor
    momentum: float
    weight_decay: float
    trust_coefficient: Any  # float, or 0-dim Tensor where it changes with the step
    eps: float = 0.0
    inside: str = "none"
    denominator: str = "split"
    max_ratio: float | None = None
    max_element: float | None = None
    max_norm: float | None = None
    trust_clip: bool = False
    zero_norm: str = "one"
    nesterov: bool = False
    maximize: bool = False
    adapt: bool = True
    nonfinite: str = "propagate"

    @property
    def watches(self) -> bool:
        """Whether a tensor's gradient norm is wanted although it has no trust ratio.

        An element clamp would hide an infinite gradient, and a skipped one must be known before anything is written.
        """
        return self.max_element is not None or self.nonfinite == "skip"

    def ratio_options(self) -> dict[str, Any]:
        """The arguments of `trust_ratio` and `trust_ratios`."""
        penalty = {"split": self.weight_decay, "joint": 0.0, "momentum": self.momentum}
        return {
            "coefficient": self.trust_coefficient,
            "penalty": penalty[self.denominator],
            "eps": self.eps,
            "max_norm": self.max_norm,
            "max_ratio": self.max_ratio,
            "clip_to_lr": self.lr if self.trust_clip else None,
            "zero_norm": self.zero_norm,
        }

    def factors(self, ratio: Any) -> tuple[Any, Any]:
        """What a ratio and the lr come to (inside, outside) the momentum buffer."""
        if self.inside == "none":
            return 1.0, self.lr * ratio
        if self.inside == "ratio":
            return ratio, self.lr
        return self.lr * ratio, 1.0


def norm(tensor: Tensor) -> Tensor:
    """L2 norm as a 0-dim tensor, accumulated in float32 where the tensor has less."""
    return vector_norm(tensor, dtype=_norm_dtype(tensor))


def _norm_dtype(tensor: Tensor) -> torch.dtype | None:
    return torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else None


def apply(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    rule: Rule,
    path: str = "auto",
) -> None:
    """Update ``params`` and their momentum ``buffers`` in place.

    Args:
        params: The parameters.
        grads: Their gradients.
        buffers: Their momentum buffers, zeros before the first step; empty where rule.momentum is 0.
        rule: The hyper-parameters.
        path: "loop", "fused", "foreach", or "auto": fused on the CPU, foreach elsewhere and under `torch.compile`.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, param in enumerate(params):
        kinds.setdefault((param.device, param.dtype), []).append(i)
    for (device, _), which in kinds.items():
        update = {"loop": update_loop, "fused": update_fused, "foreach": update_foreach}[
            _choose(device) if path == "auto" else path
        ]
        update(
            [params[i] for i in which],
            [grads[i] for i in which],
            [buffers[i] for i in which] if buffers else [],
            rule,
        )


def _choose(device: torch.device) -> str:
    if device.type != "cpu" or torch.compiler.is_compiling():
        return "foreach"
    return "fused" if kernels.AVAILABLE else "loop"


def update_loop(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], rule: Rule
) -> None:
    """The rule, one tensor after the other, as it is written."""
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if rule.maximize:
            g = -g
        d = g.add(p, alpha=rule.weight_decay) if rule.weight_decay else g
        ratio: Any = 1.0
        finite = None
        if rule.adapt:
            weight_norm, update_norm = norm(p), norm(d if rule.denominator == "joint" else g)
            ratio = trust_ratios(weight_norm, update_norm, **rule.ratio_options())
            finite = update_norm.isfinite()
            if rule.zero_norm == "raw":
                d = torch.where((weight_norm > 0) & (update_norm > 0), d, g)
        elif rule.watches:
            finite = norm(g).isfinite()
            ratio = torch.where(finite, 1.0, math.nan)
        if rule.max_element is not None:
            d = d.clamp(-rule.max_element, rule.max_element)
        inside, outside = rule.factors(ratio)
        u = d * inside
        b = None
        if buffers:
            b = buffers[i] * rule.momentum + u
            u = u + b * rule.momentum if rule.nesterov else b
        w = p - u * outside
        if rule.nonfinite == "skip":
            w = torch.where(finite, w, p)
            b = torch.where(finite, b, buffers[i]) if b is not None else None
        p.copy_(w)
        if b is not None:
            buffers[i].copy_(b)


def update_foreach(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], rule: Rule
) -> None:
    """The rule on lists of tensors of one device and dtype, without reading a value back from the device."""
    dtype = _norm_dtype(params[0])
    if rule.maximize:
        grads = torch._foreach_neg(grads)
    d = torch._foreach_add(grads, params, alpha=rule.weight_decay) if rule.weight_decay else grads
    ratio: Any = 1.0
    finite = None
    if rule.adapt:
        weight_norm = torch.stack(torch._foreach_norm(params, dtype=dtype))
        measured = d if rule.denominator == "joint" else grads
        update_norm = torch.stack(torch._foreach_norm(measured, dtype=dtype))
        ratio = trust_ratios(weight_norm, update_norm, **rule.ratio_options())
        finite = update_norm.isfinite()
        if rule.zero_norm == "raw":
            live = (weight_norm > 0) & (update_norm > 0)
            d = [torch.where(*three) for three in zip(live, d, grads, strict=True)]
    elif rule.watches:
        finite = torch.stack(torch._foreach_norm(grads, dtype=dtype)).isfinite()
        ratio = torch.where(finite, 1.0, math.nan)
    if rule.max_element is not None:
        d = torch._foreach_clamp_max(d, rule.max_element)
        torch._foreach_clamp_min_(d, -rule.max_element)
    inside, outside = rule.factors(ratio)
    u = _scaled(d, inside)
    before = [x.clone() for x in (*params, *buffers)] if rule.nonfinite == "skip" else []
    if buffers:
        torch._foreach_mul_(buffers, rule.momentum)
        torch._foreach_add_(buffers, u)
        u = torch._foreach_add(u, buffers, alpha=rule.momentum) if rule.nesterov else buffers
    torch._foreach_sub_(params, _scaled(u, outside))
    for i, old in enumerate(before):
        new = params[i] if i < len(params) else buffers[i - len(params)]
        new.copy_(torch.where(finite[i % len(params)], new, old))


def _scaled(tensors: list[Tensor], factor: Any) -> list[Tensor]:
    """The tensors times one factor, or times one factor each."""
    if isinstance(factor, Tensor) and factor.ndim:
        return torch._foreach_mul(tensors, list(factor.unbind()))
    return torch._foreach_mul(tensors, factor)


def update_fused(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], rule: Rule
) -> None:
    """The rule by torch's fused SGD kernel on the CPU; `update_loop` for any tensor that the kernel cannot take."""
    rest = []  # for the loop
    plain = []  # without a trust ratio: one kernel call for all of them
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        b = buffers[i : i + 1]
        if not kernels.takes(p, g, *b):
            rest.append(i)
            continue
        weight_norm, update_norm = _norms(p, g, rule)
        if not math.isfinite(update_norm):
            if rule.nonfinite == "propagate":
                rest.append(i)
        elif not _elements_within(rule.max_element, p, g, weight_norm, update_norm, rule):
            rest.append(i)
        elif not rule.adapt:
            plain.append(i)
        else:
            decay = rule.weight_decay
            if rule.zero_norm == "raw" and not (weight_norm > 0 and update_norm > 0):
                decay = 0.0
            ratio = trust_ratio(weight_norm, update_norm, **rule.ratio_options())
            if not _kernel([p], [g], b, rule, ratio, decay):
                rest.append(i)
    if plain and not _kernel(*_picked(plain, params, grads, buffers), rule, 1.0, rule.weight_decay):
        rest += plain
    if rest:
        update_loop(*_picked(rest, params, grads, buffers), rule)


def _picked(which: list[int], *lists: list[Tensor]) -> list[list[Tensor]]:
    return [[tensors[i] for i in which] if tensors else [] for tensors in lists]


def _norms(p: Tensor, g: Tensor, rule: Rule) -> tuple[float, float]:
    """(‖w‖, ‖g‖ or ‖d‖ as the rule's denominator says); 0 for a norm that the rule does not need."""
    if not rule.adapt:
        bounded = rule.max_element is not None and rule.weight_decay
        return norm(p).item() if bounded else 0.0, norm(g).item() if rule.watches else 0.0
    if rule.denominator == "joint" and rule.weight_decay:
        d = g.add(p, alpha=-rule.weight_decay if rule.maximize else rule.weight_decay)
        return norm(p).item(), norm(d).item()
    return norm(p).item(), norm(g).item()


def _elements_within(
    bound: float | None, p: Tensor, g: Tensor, weight_norm: float, update_norm: float, rule: Rule
) -> bool:
    """Whether no element of g + weight_decay * p can exceed ``bound``, so that a clamp at it changes nothing.

    The L2 norms, which are at hand, bound the elements; only where they do not suffice the maximum norms are taken.
    The last percent is left to the exact clamp, for the norms are rounded.
    """
    if bound is None or update_norm + rule.weight_decay * weight_norm < 0.99 * bound:
        return True
    largest = vector_norm(g, math.inf).item() + rule.weight_decay * vector_norm(p, math.inf).item()
    return largest < 0.99 * bound


def _kernel(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    rule: Rule,
    ratio: float,
    weight_decay: float,
) -> bool:
    """Hand tensors of one ratio to the kernel; False, and nothing written, where it cannot express the rule."""
    inside, outside = rule.factors(ratio)
    if buffers and inside != 1.0:
        # The kernel's nesterov step knows no factor, and a tiny one is lost in its 1 - dampening.
        if rule.nesterov or not kernels.scale_survives(inside, params[0].dtype):
            return False
    kernels.fused_sgd(
        params,
        grads,
        buffers,
        lr=outside,
        momentum=rule.momentum if buffers else 0.0,
        weight_decay=weight_decay,
        scale=inside,
        nesterov=rule.nesterov,
        maximize=rule.maximize,
    )
    return True
