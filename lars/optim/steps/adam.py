"""Adam with a trust ratio: the update of LAMB.

An `AdamRule` holds the hyper-parameters of one parameter group; `lars.LAMB` gives the formulas.
Three functions apply a rule to lists of tensors, and agree to rounding:

- `adam_loop` takes one tensor at a time and spells out every formula. It is the reference, and the
  fallback for tensors that the others cannot take.
- `adam_foreach` is for accelerators and `torch.compile`. It launches few kernels, and reads nothing
  back from the device.
- `lars.optim.cpu.fused.adam_fused` calls the compiled CPU kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lars.optim.steps.descend import blend, descend, replace_by
from lars.optim.steps.tensors import (
    Tensors,
    clones,
    norm,
    norms,
    on_device,
    restore_where_not,
    scaled,
)
from lars.optim.steps.trust import trust_ratios


@dataclass(frozen=True, slots=True)
class AdamRule:
    """The hyper-parameters of one group, with the names and meanings of `lars.LAMB`.

    Attributes:
        adapt: Whether this group has a trust ratio; it includes ``always_adapt``.
        clip: The factor of the gradients from global clipping; None: no clipping.
        found_inf: See `lars.optim.steps.descend`.
    """

    lr: Any  # float, or 0-dim Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    bias_correction: bool
    max_weight_norm: float | None
    max_ratio: float | None
    decoupled_weight_decay: bool
    adapt: bool
    nonfinite: str
    clip: Any = None  # float, or 0-dim Tensor
    found_inf: Tensor | None = None

    @property
    def skip(self) -> bool:
        """Whether a tensor with a nonfinite gradient stays as it is."""
        return self.nonfinite == "skip"

    @property
    def decay(self) -> float:
        """Weight decay that is added to the update."""
        return self.weight_decay if self.decoupled_weight_decay else 0.0

    @property
    def coupled_decay(self) -> float:
        """Weight decay that is added to the gradient."""
        return 0.0 if self.decoupled_weight_decay else self.weight_decay

    def on(self, device: torch.device) -> AdamRule:
        """A copy of the rule with its tensors on the device."""
        names = ("lr", "clip", "found_inf")
        return replace(self, **{name: on_device(getattr(self, name), device) for name in names})

    def ratio_options(self) -> dict[str, Any]:
        """The keyword arguments of `trust_ratios`."""
        return {"max_ratio": self.max_ratio}

    def bounded(self, weight_norm: Tensor) -> Tensor:
        """‖w‖ as the ratio uses it: at most ``max_weight_norm``."""
        if self.max_weight_norm is None:
            return weight_norm
        return weight_norm.clamp(max=self.max_weight_norm)


def corrections(steps: Tensor, beta: float) -> Tensor:
    """1 - beta^t, without the cancellation that the plain formula suffers in float32."""
    return -torch.expm1(steps * (math.log(beta) if beta > 0 else -math.inf))


def adam_loop(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    rule: AdamRule,
) -> None:
    """Apply the rule to one tensor at a time; see `lars.optim.base.apply_rule` for the arguments."""
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        if rule.clip is not None:
            (g,) = scaled([g], rule.clip)
        keep = norm(g).isfinite() if rule.skip else None
        if rule.coupled_decay:
            g = g.add(p, alpha=rule.coupled_decay)
        new_m = m.lerp(g, 1 - rule.beta1)
        new_v = rule.beta2 * v + (1 - rule.beta2) * g * g
        m_hat, root_v_hat = new_m, new_v.sqrt()
        if rule.bias_correction:
            t = step.to(p.dtype if p.dtype == torch.float64 else torch.float32) + 1
            m_hat = new_m / corrections(t, rule.beta1)
            root_v_hat = root_v_hat / corrections(t, rule.beta2).sqrt()  # v̂ itself may overflow
        u = m_hat / (root_v_hat + rule.eps)
        if rule.decay:
            u = u.add(p, alpha=rule.decay)
        ratio: Any = 1.0
        if rule.adapt:
            ratio = trust_ratios(rule.bounded(norm(p)), norm(u), **rule.ratio_options())
        new_p = p - u * (rule.lr * ratio)
        for old, new in ((p, new_p), (m, new_m), (v, new_v), (step, step + 1)):
            old.copy_(new if keep is None else torch.where(keep, new, old))


def adam_foreach(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    rule: AdamRule,
) -> None:
    """Apply the rule to lists of tensors that share a device and dtype.

    Nothing is read back to the host.
    """
    if rule.clip is not None:
        grads = scaled(grads, rule.clip)
    keep: Any = None
    before: list[Tensors] = []
    changed = (params, exp_avgs, exp_avg_sqs, steps)
    if rule.skip:
        keep = norms(grads).isfinite()
        before = clones(*changed)
    if rule.coupled_decay:
        grads = list(torch._foreach_add(grads, params, alpha=rule.coupled_decay))
    blend(exp_avgs, grads, 1 - rule.beta1, rule.found_inf)
    if rule.found_inf is None:
        torch._foreach_add_(steps, 1)
        torch._foreach_mul_(exp_avg_sqs, rule.beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - rule.beta2)
    else:
        torch._foreach_add_(steps, [1 - rule.found_inf] * len(steps))
        squares = list(torch._foreach_mul(exp_avg_sqs, rule.beta2))
        torch._foreach_addcmul_(squares, grads, grads, 1 - rule.beta2)
        replace_by(exp_avg_sqs, squares, rule.found_inf)
    u = _updates(params, exp_avgs, exp_avg_sqs, steps, rule)
    ratio: Any = adam_ratios(params, u, rule) if rule.adapt else 1.0
    descend(params, u, [], lr=rule.lr * ratio, found_inf=rule.found_inf)
    for old, new in zip(before, changed, strict=bool(before)):
        restore_where_not(keep, old, new)


def adam_ratios(weights: Tensors, updates: Tensors, rule: AdamRule) -> Tensor:
    """The trust ratios of tensors with these weights and updates u."""
    return trust_ratios(rule.bounded(norms(weights)), norms(updates), **rule.ratio_options())


def last_adam_ratios(
    weights: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors, rule: AdamRule
) -> Tensor:
    """The trust ratios of the last step from the weights before it and the state after it."""
    if not rule.adapt:
        return torch.ones(len(weights), device=weights[0].device)
    return adam_ratios(weights, _updates(weights, exp_avgs, exp_avg_sqs, steps, rule), rule)


def _updates(
    weights: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors, rule: AdamRule
) -> Tensors:
    """The update u of each tensor, after step number ``steps``."""
    u = _directions(exp_avgs, exp_avg_sqs, steps, rule)
    if rule.decay:
        torch._foreach_add_(u, weights, alpha=rule.decay)
    return u


def _directions(exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors, rule: AdamRule) -> Tensors:
    """m̂ / (√v̂ + eps) of each tensor, after step number ``steps``."""
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    numerators: Any = exp_avgs
    if rule.bias_correction:
        t = torch.stack(steps)
        if exp_avgs[0].dtype == torch.float64:
            t = t.double()
        torch._foreach_div_(denominators, corrections(t, rule.beta2).sqrt().unbind())
        numerators = torch._foreach_div(exp_avgs, corrections(t, rule.beta1).unbind())
    torch._foreach_add_(denominators, rule.eps)
    return list(torch._foreach_div(numerators, denominators))
