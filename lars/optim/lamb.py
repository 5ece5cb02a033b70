"""LAMB: the update of Adam under a layer-wise trust ratio, in its published forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.optim import Optimizer

from lars.optim import kernels
from lars.optim.groups import (
    check_bound,
    check_choice,
    check_not_negative,
    check_number,
    form_options,
    keep_options,
    options_of,
    parameter_groups,
    with_grads,
)
from lars.optim.trust import trust_ratios
from lars.optim.update import (
    Tensors,
    add_scaled,
    by_kind,
    choose_path,
    clones,
    norm,
    norms,
    on_device,
    pick,
    restore_where_not,
    scaled,
)

# The options that make a form, with their values where a form says nothing.
PLAIN: dict[str, Any] = {
    "bias_correction": True,
    "max_grad_norm": None,
    "max_weight_norm": None,
    "max_ratio": None,
    "always_adapt": True,
}
FORMS: dict[str, dict[str, Any]] = {
    "nus": {"bias_correction": False, "max_grad_norm": 1.0, "always_adapt": False},
    "paper": {},
    "tvlars": {"bias_correction": False, "max_weight_norm": 10.0},
    "apex": {"max_grad_norm": 1.0, "always_adapt": False},
    "lambc": {"max_ratio": 1.0},
}
CHOICES = {
    "nonfinite": ("propagate", "skip"),
    "path": ("auto", "loop", "fused", "foreach"),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """The hyper-parameters of one group; names and meanings are those of `LAMB`."""

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


class LAMB(Optimizer):
    r"""Adam whose update is scaled by each layer's trust ratio.

    For each tensor w with gradient g and step count t from 1:

        g     = g * min(1, max_grad_norm / (‖all gradients‖ + 1e-6))
        m     = β1 m + (1 - β1) g;     v = β2 v + (1 - β2) g²
        u     = m̂ / (√v̂ + eps) + weight_decay * w
        ratio = min(‖w‖, max_weight_norm) / ‖u‖      at most max_ratio; 1 where a norm is 0
        w     = w - lr * ratio * u

    with m̂ = m / (1 - β1^t) and v̂ = v / (1 - β2^t), or m and v themselves without bias correction.
    Different algorithms go by this name:

    ================= =============== ============= =============== ================ =========
    form              bias correction max_grad_norm max_weight_norm ratio where      max_ratio
    ================= =============== ============= =============== ================ =========
    ``nus`` (default) no              1             none            weight_decay > 0 none
    ``paper``         yes             none          none            everywhere       none
    ``tvlars``        no              none          10              everywhere       none
    ``apex``          yes             1             none            weight_decay > 0 none
    ``lambc``         yes             none          none            everywhere       1
    ================= =============== ============= =============== ================ =========

    Sources: ``nus``: NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch. ``paper``: algorithm 2 of the paper and
    optax.lamb. ``tvlars``: KhoiDOO/tvlars and cybertronai/pytorch-lamb. ``apex``: NVIDIA apex's
    FusedLAMB and timm's Lamb in their default settings. ``lambc``: the paper's with the ratio
    clipped at 1 (timm's trust_clip).

    Deliberate difference from the NUS code: the gradients themselves are left as they are; the
    clipping is part of the step.

    Args:
        params: Parameters or parameter groups; see `parameter_groups` for the usual two.
        lr: Learning rate, a float or a 0-dim tensor.
        betas: Decay of the averages of the gradient and of its square.
        eps: Added to √v̂.
        weight_decay: Weight decay.
        form: The named rule. Options given beside it take precedence over what it sets.
        bias_correction: Whether m and v are corrected for their start at 0; None: the form's.
        max_grad_norm: Bound of the norm over all gradients of this optimizer; None: no bound;
            "form": the form's.
        max_weight_norm: Bound of ‖w‖ in the ratio; None: no bound; "form": the form's.
        max_ratio: Upper bound of the ratio; None: no bound; "form": the form's.
        always_adapt: Whether groups without weight decay have a ratio too; None: the form's.
        decoupled_weight_decay: True: the decay is part of u, as in AdamW. False: it is added to
            the gradient, as in Adam.
        adapt: Whether there is a trust ratio; usually set per group. Without it, ``paper`` is
            `torch.optim.AdamW`, or `torch.optim.Adam` with decoupled_weight_decay=False.
        nonfinite: What happens to a gradient whose norm is not finite, as in `LARS`: "propagate"
            makes the weights nan, "skip" leaves the tensor and its state as they are. With
            max_grad_norm one such gradient concerns all tensors, for it spoils the common norm.
        path: How to compute: "loop", tensor by tensor; "fused", compiled kernels for CPUs;
            "foreach", for accelerators and `torch.compile`; "auto", the fastest for the device.
            The result is the same to rounding.

    Raises:
        ValueError: A name is not known, or a value is out of range.
        TypeError: A value is no number, or betas are no two numbers.

    References:
        You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
        arXiv 1904.00962.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        form: str = "nus",
        bias_correction: bool | None = None,
        max_grad_norm: float | Literal["form"] | None = "form",
        max_weight_norm: float | Literal["form"] | None = "form",
        max_ratio: float | Literal["form"] | None = "form",
        always_adapt: bool | None = None,
        decoupled_weight_decay: bool = True,
        adapt: bool = True,
        nonfinite: str = "propagate",
        path: str = "auto",
    ) -> None:
        said = {"bias_correction": bias_correction, "always_adapt": always_adapt}
        bounds = {
            "max_grad_norm": max_grad_norm,
            "max_weight_norm": max_weight_norm,
            "max_ratio": max_ratio,
        }
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "form": form,
            **form_options(form, FORMS, PLAIN),
            **{name: value for name, value in said.items() if value is not None},
            **{name: value for name, value in bounds.items() if value != "form"},
            "decoupled_weight_decay": decoupled_weight_decay,
            "adapt": adapt,
            "nonfinite": nonfinite,
            "path": path,
        }
        super().__init__(*options_of(params, defaults))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one that names a ``form`` gets that form's options where it sets none."""
        if "form" in param_group:
            param_group = form_options(param_group["form"], FORMS, PLAIN) | param_group
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_not_negative(group, "lr", "eps", "weight_decay")
        check_bound(group, "max_grad_norm", "max_weight_norm", "max_ratio")
        for name, choices in CHOICES.items():
            check_choice(name, group[name], choices)
        _check_betas(group["betas"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; options that its groups lack (plain AdamW's, for one) stay as they are."""
        before = self.param_groups
        super().load_state_dict(state_dict)
        keep_options(self.param_groups, before)
        for state in self.state.values():
            if "step" in state:  # a plain number in the NUS code, and in torch's before 1.12
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Evaluates the model and returns the loss; gradients are enabled meanwhile.

        Returns:
            What ``closure`` returned, or None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params_of = [with_grads(group, type(self).__name__) for group in self.param_groups]
        # The step goes forwards: what the norm reads last is still in a CPU's cache then.
        all_grads = [cast(Tensor, p.grad) for params in params_of for p in params][::-1]
        bounds = {group["max_grad_norm"] for group in self.param_groups if all_grads} - {None}
        total = total_norm(all_grads) if bounds else None
        clips = {bound: clip_coefficient(cast(Tensor, total), bound) for bound in bounds}
        for group, params in zip(self.param_groups, params_of, strict=True):
            clip = clips.get(group["max_grad_norm"])
            grads = [cast(Tensor, p.grad) for p in params]
            states = [self._state_of(p) for p in params]
            for (device, _), which in by_kind(params).items():
                path = choose_path(device) if group["path"] == "auto" else group["path"]
                paths: dict[str, Callable[..., None]] = {
                    "loop": lamb_loop,
                    "fused": lamb_fused,
                    "foreach": lamb_foreach,
                }
                paths[path](
                    pick(params, which),
                    pick(grads, which),
                    [states[i]["exp_avg"] for i in which],
                    [states[i]["exp_avg_sq"] for i in which],
                    [states[i]["step"] for i in which],
                    self._rule(group, on_device(group["lr"], device)),
                    on_device(clip, device),
                )
        return loss

    def _rule(self, group: dict[str, Any], lr: float | Tensor) -> Rule:
        adapt = group["adapt"] and (group["always_adapt"] or group["weight_decay"] != 0)
        own = {name: group[name] for name in Rule.__slots__ if name in group}
        beta1, beta2 = group["betas"]
        return Rule(**own | {"lr": lr, "adapt": adapt}, beta1=beta1, beta2=beta2)

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        elif state["step"].device != param.device:  # loaded from a checkpoint mapped to the CPU
            state["step"] = state["step"].to(param.device)
        return cast(dict[str, Tensor], state)


def _check_betas(betas: Any) -> None:
    if not isinstance(betas, tuple | list):
        raise TypeError(f"betas={betas!r} must be two numbers in [0, 1)")
    for beta in betas:
        check_number("betas", beta)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas} must be two numbers in [0, 1)")


def total_norm(grads: Tensors) -> Tensor:
    """L2 norm over all gradients, a 0-dim tensor on the device of the first."""
    parts = []
    for (device, _), which in by_kind(grads).items():
        tensors = pick(grads, which)
        if choose_path(device) == "fused" and all(map(kernels.takes, tensors)):
            part = torch.tensor(kernels.squares(tensors), dtype=torch.float64).sum().sqrt()
        else:
            part = vector_norm(norms(tensors))
        parts.append(part.to(grads[0].device))
    return vector_norm(torch.stack(parts))


def clip_coefficient(total: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (total + 1e-6)), a 0-dim tensor; nan where the norm is not finite."""
    return torch.where(total.isfinite(), (max_norm / (total + 1e-6)).clamp(max=1.0), math.nan)


def corrections(steps: Tensor, beta: float) -> Tensor:
    """1 - beta^t, without the cancellation that the formula as it stands suffers in float32."""
    return -torch.expm1(steps * (math.log(beta) if beta > 0 else -math.inf))


# ------------------------------------------------------------------------------------- reference


def lamb_loop(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    rule: Rule,
    clip: Tensor | None,
) -> None:
    """The rule as it is written, one tensor after the other."""
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        if clip is not None:
            (g,) = scaled([g], clip)
        keep = norm(g).isfinite() if rule.nonfinite == "skip" else None
        if rule.weight_decay and not rule.decoupled_weight_decay:
            g = g.add(p, alpha=rule.weight_decay)
        new_m = m.lerp(g, 1 - rule.beta1)
        new_v = rule.beta2 * v + (1 - rule.beta2) * g * g
        m_hat, v_hat = new_m, new_v
        if rule.bias_correction:
            t = step.to(p.dtype if p.dtype == torch.float64 else torch.float32) + 1
            m_hat = new_m / corrections(t, rule.beta1)
            v_hat = new_v / corrections(t, rule.beta2)
        u = m_hat / (v_hat.sqrt() + rule.eps)
        if rule.weight_decay and rule.decoupled_weight_decay:
            u = u.add(p, alpha=rule.weight_decay)
        ratio: Any = 1.0
        if rule.adapt:
            ratio = trust_ratios(_bounded(norm(p), rule), norm(u), max_ratio=rule.max_ratio)
        new_p = p - u * (rule.lr * ratio)
        for old, new in ((p, new_p), (m, new_m), (v, new_v), (step, step + 1)):
            old.copy_(new if keep is None else torch.where(keep, new, old))


def _bounded(weight_norm: Tensor, rule: Rule) -> Tensor:
    return (
        weight_norm if rule.max_weight_norm is None else weight_norm.clamp(max=rule.max_weight_norm)
    )


# ------------------------------------------------------------------------------------ accelerator


def lamb_foreach(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    rule: Rule,
    clip: Tensor | None,
) -> None:
    """The rule on lists of tensors of one device and dtype, with no value read to the host."""
    if clip is not None:
        grads = scaled(grads, clip)
    keep: Any = None
    before: list[Tensors] = []
    changed = (params, exp_avgs, exp_avg_sqs, steps)
    if rule.nonfinite == "skip":
        keep = norms(grads).isfinite()
        before = clones(*changed)
    if rule.weight_decay and not rule.decoupled_weight_decay:
        grads = list(torch._foreach_add(grads, params, alpha=rule.weight_decay))
    torch._foreach_add_(steps, 1)
    torch._foreach_lerp_(exp_avgs, grads, 1 - rule.beta1)
    torch._foreach_mul_(exp_avg_sqs, rule.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - rule.beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    numerators: Any = exp_avgs
    if rule.bias_correction:
        t = torch.stack(steps)
        if params[0].dtype == torch.float64:
            t = t.double()
        torch._foreach_div_(denominators, corrections(t, rule.beta2).sqrt().unbind())
        numerators = torch._foreach_div(exp_avgs, corrections(t, rule.beta1).unbind())
    torch._foreach_add_(denominators, rule.eps)
    u = list(torch._foreach_div(numerators, denominators))
    if rule.weight_decay and rule.decoupled_weight_decay:
        torch._foreach_add_(u, params, alpha=rule.weight_decay)
    ratio: Any = 1.0
    if rule.adapt:
        ratio = trust_ratios(_bounded(norms(params), rule), norms(u), max_ratio=rule.max_ratio)
    add_scaled(params, u, -rule.lr * ratio)
    for old, new in zip(before, changed, strict=bool(before)):
        restore_where_not(keep, old, new)


# -------------------------------------------------------------------------------------------- CPU


def lamb_fused(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    rule: Rule,
    clip: Tensor | None,
) -> None:
    """The rule by the compiled kernels; by `lamb_loop` where they cannot take a tensor."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps)
    coefficient = 1.0 if clip is None else clip.item()
    for_kernel: list[int] = []
    for_loop: list[int] = []
    for i, tensors in enumerate(zip(*lists[:4], strict=True)):
        (for_kernel if kernels.takes(*tensors) else for_loop).append(i)
    if for_kernel and rule.nonfinite == "skip":
        finite = (norms(pick(grads, for_kernel)) * coefficient).isfinite().tolist()
        for_kernel = [i for i, sound in zip(for_kernel, finite, strict=True) if sound]
    if for_kernel:
        p, g, m, v, s = (pick(tensors, for_kernel) for tensors in lists)
        torch._foreach_add_(s, 1)
        counts = torch.stack(s).tolist()
        scales = {t: bias_scales(t, rule) for t in set(counts)}
        kernels.lamb(
            p,
            g,
            m,
            v,
            [scales[t] for t in counts],
            lr=float(rule.lr),
            betas=(rule.beta1, rule.beta2),
            eps=rule.eps,
            weight_decay=rule.weight_decay,
            decoupled=rule.decoupled_weight_decay,
            adapt=rule.adapt,
            max_weight_norm=rule.max_weight_norm,
            max_ratio=rule.max_ratio,
            clip=coefficient,
        )
    if for_loop:
        p, g, m, v, s = (pick(tensors, for_loop) for tensors in lists)
        lamb_loop(p, g, m, v, s, rule, clip)


def bias_scales(step: float, rule: Rule) -> tuple[float, float]:
    """m̂ / m and √v̂ / √v in the step with this number; 1 without bias correction."""
    if not rule.bias_correction:
        return 1.0, 1.0
    return 1 / (1 - rule.beta1**step), (1 - rule.beta2**step) ** -0.5


def create_lamb_optimizer(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    exclude_layers: Collection[str] = ("bn", "ln", "bias"),
    **options: Any,
) -> LAMB:
    """`LAMB` over a model.

    Args:
        model: The model.
        lr: Learning rate.
        betas: Decay of the averages of the gradient and of its square.
        eps: ``eps`` of `LAMB`.
        weight_decay: Weight decay of the adapted parameters.
        exclude_layers: What gets neither weight decay nor trust ratio: norm layers of every kind
            if there is any word in it, biases too if one of the words is "bias".
        **options: Further arguments of `LAMB`.
    """
    exclude = [
        kind
        for kind, on in {"norm": bool(exclude_layers), "bias": "bias" in exclude_layers}.items()
        if on
    ]
    groups = parameter_groups(model, weight_decay, exclude=exclude)
    return LAMB(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)
