"""The update of SGD with momentum under a trust ratio, and three ways to carry it out.

A `Rule` holds the hyper-parameters of one parameter group and the arithmetic between norms and
step. With the ratio of `lars.optim.trust`, for a weight w, its gradient g and momentum buffer b:

    d = clamp(g + weight_decay * w, ±max_element)
    b = momentum * b + inside * d
    w = w - outside * b

where ``inside`` and ``outside`` are the shares of lr * ratio that stand inside and outside the
momentum buffer. Three functions apply a rule to lists of tensors, and agree to rounding:

- `update_loop`: one tensor after the other, every formula written out. The reference, and the
  fallback for whatever the others cannot take.
- `update_fused`: for the CPU, by the kernels of kernels.c. One pass over a tensor takes its norms,
  and one updates it while it is in cache.
- `update_foreach`: for accelerators and `torch.compile`. Few launches, and nothing is read back
  from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lars.optim import kernels
from lars.optim.trust import one_or_nan, trust_ratios

Tensors = list[Tensor]


@dataclass(frozen=True, slots=True)
class Rule:
    """The hyper-parameters of one group; names and meanings are those of `lars.LARS`."""

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

    @property
    def watches(self) -> bool:
        """Whether the gradient's norm is wanted even where there is no trust ratio.

        The element clamp would hide an infinite gradient, and what is to be skipped must be known
        before anything is written.
        """
        return self.max_element is not None or self.nonfinite == "skip"

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

    def shares(self, ratio: Any) -> tuple[Any, Any]:
        """What stands (inside, outside) the momentum buffer; the product is lr * ratio."""
        if self.inside == "none":
            return 1.0, self.lr * ratio
        if self.inside == "ratio":
            return ratio, self.lr
        return self.lr * ratio, 1.0


def update(
    params: Tensors, grads: Tensors, buffers: Tensors, rule: Rule, path: str = "auto"
) -> None:
    """Update parameters and momentum buffers in place.

    Args:
        params: The parameters.
        grads: Their gradients.
        buffers: Their momentum buffers, zeros before the first step; empty if the momentum is 0.
        rule: The hyper-parameters.
        path: "loop", "fused", "foreach", or "auto", see `choose_path`.
    """
    for (device, _), which in by_kind(params).items():
        here = replace(
            rule,
            lr=on_device(rule.lr, device),
            trust_coefficient=on_device(rule.trust_coefficient, device),
        )
        run = {"loop": update_loop, "fused": update_fused, "foreach": update_foreach}
        run[choose_path(device) if path == "auto" else path](
            pick(params, which), pick(grads, which), pick(buffers, which), here
        )


def choose_path(device: torch.device) -> str:
    """The fastest path: compiled kernels on the CPU, foreach on other devices and for torch.compile."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return "foreach"
    return "fused" if kernels.available() else "loop"


def by_kind(params: Tensors) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    """Which parameters share a device and a dtype, by their positions."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, param in enumerate(params):
        kinds.setdefault((param.device, param.dtype), []).append(i)
    return kinds


def pick(tensors: Tensors, which: Sequence[int]) -> list[Tensor]:
    """The tensors at these positions; none of none."""
    return [tensors[i] for i in which] if tensors else []


def on_device(value: Any, device: torch.device) -> Any:
    """The value itself, or, of a tensor, its equal on the device."""
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def norm_dtype(tensor: Tensor) -> torch.dtype | None:
    """What the norm of a tensor is computed in: at least float32."""
    return torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else None


def norm(tensor: Tensor) -> Tensor:
    """L2 norm, a 0-dim tensor."""
    return vector_norm(tensor, dtype=norm_dtype(tensor))


def norms(tensors: Tensors) -> Tensor:
    """L2 norms of tensors of one device and dtype, as a vector."""
    return torch.stack(torch._foreach_norm(tensors, dtype=norm_dtype(tensors[0])))


# ------------------------------------------------------------------------------------- reference


def update_loop(params: Tensors, grads: Tensors, buffers: Tensors, rule: Rule) -> None:
    """The rule as it is written, one tensor after the other."""
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if rule.maximize:
            g = -g
        d = g.add(p, alpha=rule.weight_decay) if rule.weight_decay else g
        ratio: Any = 1.0
        finite: Any = None
        if rule.adapt:
            weight_norm, update_norm = norm(p), norm(d if rule.denominator == "joint" else g)
            ratio = trust_ratios(weight_norm, update_norm, **rule.ratio_options())
            finite = update_norm.isfinite()
            if rule.zero_norm == "raw":
                d = torch.where((weight_norm > 0) & (update_norm > 0), d, g)
        elif rule.watches:
            ratio = one_or_nan(norm(g))
            finite = ratio.isfinite()
        if rule.max_element is not None:
            d = d.clamp(-rule.max_element, rule.max_element)
        inside, outside = rule.shares(ratio)
        u = d * inside
        changed = (p, *buffers[i : i + 1])
        before = [x.clone() for x in changed] if rule.nonfinite == "skip" else []
        if buffers:
            b = buffers[i].mul_(rule.momentum).add_(u)
            u = u.add(b, alpha=rule.momentum) if rule.nesterov else b
        p.sub_(u * outside)
        for new, old in zip(changed, before, strict=bool(before)):
            new.copy_(torch.where(finite, new, old))


# ------------------------------------------------------------------------------------ accelerator


def update_foreach(params: Tensors, grads: Tensors, buffers: Tensors, rule: Rule) -> None:
    """The rule on lists of tensors of one device and dtype, with no value read to the host."""
    if rule.maximize:
        grads = list(torch._foreach_neg(grads))
    d = grads
    if rule.weight_decay:
        d = list(torch._foreach_add(grads, params, alpha=rule.weight_decay))
    ratio: Any = 1.0
    finite: Any = None
    if rule.adapt:
        weight_norms, update_norms = (
            norms(params),
            norms(d if rule.denominator == "joint" else grads),
        )
        ratio = trust_ratios(weight_norms, update_norms, **rule.ratio_options())
        finite = update_norms.isfinite()
        if rule.zero_norm == "raw":
            live = (weight_norms > 0) & (update_norms > 0)
            d = [torch.where(*three) for three in zip(live.unbind(), d, grads, strict=True)]
    elif rule.watches:
        ratio = one_or_nan(norms(grads))
        finite = ratio.isfinite()
    if rule.max_element is not None:
        d = list(torch._foreach_clamp_max(d, rule.max_element))
        torch._foreach_clamp_min_(d, -rule.max_element)
    inside, outside = rule.shares(ratio)
    before = clones(params, buffers) if rule.nonfinite == "skip" else []
    if buffers:
        torch._foreach_mul_(buffers, rule.momentum)
        add_scaled(buffers, d, inside)
    if buffers and rule.nesterov:
        u = scaled(d, inside)
        torch._foreach_add_(u, buffers, alpha=rule.momentum)
        add_scaled(params, u, -outside)
    elif buffers:
        add_scaled(params, buffers, -outside)
    else:
        add_scaled(params, d, -inside * outside)
    for old, new in zip(before, (params, buffers), strict=bool(before)):
        if new:
            restore_where_not(finite, old, new)


def clones(*lists: Tensors) -> list[Tensors]:
    """The tensors' values, list by list."""
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def restore_where_not(keep: Tensor, old: Tensors, new: Tensors) -> None:
    """Write the old value back into each tensor whose element of ``keep`` is False."""
    chosen = [torch.where(*three) for three in zip(keep.unbind(), new, old, strict=True)]
    torch._foreach_copy_(new, chosen)


def add_scaled(tensors: Tensors, others: Tensors, factor: Any) -> None:
    """Add to each tensor one other, times one factor or its own of a vector of factors, in one pass."""
    if not isinstance(factor, Tensor):
        torch._foreach_add_(tensors, others, alpha=factor)
        return
    if tensors[0].dtype == torch.float16:
        torch._foreach_add_(tensors, scaled(others, factor))
        return
    each = factor.unbind() if factor.ndim > 0 else [factor] * len(tensors)
    torch._foreach_addcmul_(tensors, others, each)


def scaled(tensors: Tensors, factor: Any) -> Tensors:
    """New tensors of the same dtypes: all times one factor, or each times its own of a vector of factors."""
    each = isinstance(factor, Tensor) and factor.ndim > 0
    # A ratio may be beyond float16's range where the product is not.
    wide = [t.float() for t in tensors] if tensors[0].dtype == torch.float16 else tensors
    products = torch._foreach_mul(wide, factor.unbind() if each else factor)
    # A tensor without dimensions takes the factor's dtype where that is wider.
    return [product.to(tensor.dtype) for product, tensor in zip(products, tensors, strict=True)]


# -------------------------------------------------------------------------------------------- CPU


def update_fused(params: Tensors, grads: Tensors, buffers: Tensors, rule: Rule) -> None:
    """The rule by the compiled kernels; by `update_loop` where they cannot take a tensor."""
    rule = replace(rule, lr=float(rule.lr), trust_coefficient=float(rule.trust_coefficient))
    for_kernel: list[int] = []
    for_loop: list[int] = []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        (for_kernel if kernels.takes(p, g, *buffers[i : i + 1]) else for_loop).append(i)
    if for_kernel:
        kernels.lars(
            pick(params, for_kernel),
            pick(grads, for_kernel),
            pick(buffers, for_kernel),
            **rule.ratio_options(),
            lr=rule.lr,
            momentum=rule.momentum,
            weight_decay=rule.weight_decay,
            max_element=rule.max_element,
            inside=rule.inside,
            joint=rule.denominator == "joint",
            adapt=rule.adapt,
            watch=rule.watches,
            skip=rule.nonfinite == "skip",
            nesterov=rule.nesterov,
            maximize=rule.maximize,
        )
    if for_loop:
        update_loop(pick(params, for_loop), pick(grads, for_loop), pick(buffers, for_loop), rule)
