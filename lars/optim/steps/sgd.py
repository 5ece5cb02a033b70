"""SGD with momentum and a trust ratio: the update of LARS, TVLARS and `LARSWrapper` around SGD.

An `SGDRule` holds the hyper-parameters of one parameter group. For a weight w, its gradient g and
momentum buffer b, and with the ratio of `lars.optim.steps.trust`:

    d = clamp(g + weight_decay * w, ±max_element)
    b = momentum * b + inside * d
    w = w - outside * b

where ``inside`` and ``outside`` are the factors of lr * ratio that are applied before and after the
momentum buffer. Three functions apply a rule to lists of tensors, and agree to rounding:

- `sgd_loop` takes one tensor at a time and spells out every formula. It is the reference, and the
  fallback for tensors that the others cannot take.
- `sgd_foreach` is for accelerators and `torch.compile`. It launches few kernels, and reads nothing
  back from the device.
- `lars.optim.cpu.fused.sgd_fused` calls the compiled CPU kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lars.optim.steps.descend import descend
from lars.optim.steps.tensors import (
    Tensors,
    clones,
    norm,
    norms,
    on_device,
    restore_where_not,
    scaled,
)
from lars.optim.steps.trust import one_or_nan, trust_ratios


@dataclass(frozen=True, slots=True)
class SGDRule:
    """The hyper-parameters of one group, with the names and meanings of `lars.LARS`.

    The properties are the derived values that more than one implementation reads.
    """

    lr: Any  # float, or 0-dim Tensor
    momentum: float
    weight_decay: float
    trust_coefficient: Any  # float, or 0-dim Tensor
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
    found_inf: Tensor | None = None  # see lars.optim.steps.descend

    @property
    def sign(self) -> float:
        """The factor of the gradient."""
        return -1.0 if self.maximize else 1.0

    @property
    def joint(self) -> bool:
        """Whether the ratio uses the norm of the gradient plus weight decay."""
        return self.adapt and self.denominator == "joint"

    @property
    def raw(self) -> bool:
        """Whether a tensor with a zero norm gets no weight decay."""
        return self.adapt and self.zero_norm == "raw"

    @property
    def skip(self) -> bool:
        """Whether a tensor with a nonfinite gradient stays as it is."""
        return self.nonfinite == "skip"

    @property
    def watch(self) -> bool:
        """Whether the norm of the gradient is needed even without a trust ratio.

        The element clamp would hide an infinite gradient, and a tensor to skip must be known before
        anything is written.
        """
        return self.max_element is not None or self.skip

    @property
    def lr_inside(self) -> bool:
        """Whether the learning rate is applied before the momentum buffer."""
        return self.inside == "both"

    @property
    def ratio_inside(self) -> bool:
        """Whether the ratio is applied before the momentum buffer."""
        return self.inside != "none"

    def on(self, device: torch.device) -> SGDRule:
        """A copy of the rule with its tensors on the device."""
        names = ("lr", "trust_coefficient", "found_inf")
        return replace(self, **{name: on_device(getattr(self, name), device) for name in names})

    def ratio_options(self) -> dict[str, Any]:
        """The keyword arguments of `trust_ratios`."""
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
        """Split lr * ratio into the factors (inside, outside) of the momentum buffer."""
        if self.lr_inside:
            return self.lr * ratio, 1.0
        if self.ratio_inside:
            return ratio, self.lr
        return 1.0, self.lr * ratio


def sgd_loop(params: Tensors, grads: Tensors, buffers: Tensors, rule: SGDRule) -> None:
    """Apply the rule to one tensor at a time; see `lars.optim.base.apply_rule` for the arguments."""
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if rule.maximize:
            g = -g
        d = g.add(p, alpha=rule.weight_decay) if rule.weight_decay else g
        ratio: Any = 1.0
        finite: Any = None
        if rule.adapt:
            weight_norm, update_norm = norm(p), norm(d if rule.joint else g)
            ratio = trust_ratios(weight_norm, update_norm, **rule.ratio_options())
            finite = update_norm.isfinite()
            if rule.raw:
                d = torch.where((weight_norm > 0) & (update_norm > 0), d, g)
        elif rule.watch:
            ratio = one_or_nan(norm(g))
            finite = ratio.isfinite()
        if rule.max_element is not None:
            d = d.clamp(-rule.max_element, rule.max_element)
        inside, outside = rule.factors(ratio)
        u = d * inside
        changed = (p, *buffers[i : i + 1])
        before = [x.clone() for x in changed] if rule.skip else []
        if buffers:
            b = buffers[i].mul_(rule.momentum).add_(u)
            u = u.add(b, alpha=rule.momentum) if rule.nesterov else b
        p.sub_(u * outside)
        for new, old in zip(changed, before, strict=bool(before)):
            new.copy_(torch.where(finite, new, old))


def sgd_foreach(params: Tensors, grads: Tensors, buffers: Tensors, rule: SGDRule) -> None:
    """Apply the rule to lists of tensors that share a device and dtype.

    Nothing is read back to the host.
    """
    if rule.maximize:
        grads = list(torch._foreach_neg(grads))
    d, ratio, finite = _decayed_and_ratio(params, grads, rule)
    if rule.max_element is not None:
        d = list(torch._foreach_clamp_max(d, rule.max_element))
        torch._foreach_clamp_min_(d, -rule.max_element)
    inside, outside = rule.factors(ratio)
    before = clones(params, buffers) if rule.skip else []
    if not buffers:
        inside, outside = 1.0, inside * outside
    u = scaled(d, inside) if isinstance(inside, Tensor) or inside != 1.0 else d
    descend(
        *(params, u, buffers),
        lr=outside,
        momentum=rule.momentum if buffers else 0.0,
        nesterov=rule.nesterov,
        found_inf=rule.found_inf,
    )
    for old, new in zip(before, (params, buffers), strict=bool(before)):
        if new:
            restore_where_not(finite, old, new)


def sgd_ratios(weights: Tensors, grads: Tensors, rule: SGDRule) -> Tensor:
    """The trust ratios of tensors with these weights and gradients; 1 without a trust ratio."""
    if not rule.adapt:
        return torch.ones(len(weights), device=weights[0].device)
    if rule.joint and rule.weight_decay:
        decay = rule.sign * rule.weight_decay
        grads = list(torch._foreach_add(grads, weights, alpha=decay))
    return trust_ratios(norms(weights), norms(grads), **rule.ratio_options())


def _decayed_and_ratio(params: Tensors, grads: Tensors, rule: SGDRule) -> tuple[Tensors, Any, Any]:
    """The gradients plus weight decay, the ratios, and which gradients are finite.

    Without a trust ratio the ratio is 1.0. The last value is None if the rule does not need it.
    """
    d = grads
    if rule.weight_decay:
        d = list(torch._foreach_add(grads, params, alpha=rule.weight_decay))
    if rule.adapt:
        weight_norms, update_norms = norms(params), norms(d if rule.joint else grads)
        if rule.raw:
            live = (weight_norms > 0) & (update_norms > 0)
            d = [torch.where(*three) for three in zip(live.unbind(), d, grads, strict=True)]
        ratio = trust_ratios(weight_norms, update_norms, **rule.ratio_options())
        return d, ratio, update_norms.isfinite()
    if rule.watch:
        ratio = one_or_nan(norms(grads))
        return d, ratio, ratio.isfinite()
    return d, 1.0, None
