"""LAMB: the update of Adam with a layer-wise trust ratio, in its published forms."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from lars.names import LAMB_FORMS
from lars.optim.base import LayerwiseOptimizer, apply_rule, choose_path, rule_of
from lars.optim.cpu import kernels
from lars.optim.cpu.fused import adam_fused
from lars.optim.groups import parameter_groups, words
from lars.optim.options import (
    CHOICES,
    bounds_of,
    check_bound,
    check_choices,
    check_not_negative,
    check_number,
    defaults_from,
    group_with_form,
    params_and_defaults,
    with_form,
)
from lars.optim.steps.adam import AdamRule, adam_foreach, adam_loop, last_adam_ratios
from lars.optim.steps.tensors import Tensors, by_kind, norms, pick

PATHS = {"loop": adam_loop, "fused": adam_fused, "foreach": adam_foreach}
# The options that a form can set, with their values where it does not.
FORM_DEFAULTS: dict[str, Any] = {
    "bias_correction": True,
    "max_grad_norm": None,
    "max_weight_norm": None,
    "max_ratio": None,
    "always_adapt": True,
}


class LAMB(LayerwiseOptimizer):
    r"""Adam with its update scaled by the trust ratio of each layer.

    For each tensor w with gradient g and step count t from 1:

        g     = g * min(1, max_grad_norm / (‖all gradients‖ + 1e-6))
        m     = β1 m + (1 - β1) g;     v = β2 v + (1 - β2) g²
        u     = m̂ / (√v̂ + eps) + weight_decay * w
        ratio = min(‖w‖, max_weight_norm) / ‖u‖      at most max_ratio; 1 where a norm is 0
        w     = w - lr * ratio * u

    where m̂ = m / (1 - β1^t) and v̂ = v / (1 - β2^t), or m and v themselves without bias correction.
    Several algorithms are called LAMB:

    ================= =============== ============= =============== ================ =========
    form              bias correction max_grad_norm max_weight_norm ratio where      max_ratio
    ================= =============== ============= =============== ================ =========
    ``nus`` (default) no              1             none            weight_decay > 0 none
    ``paper``         yes             none          none            everywhere       none
    ``tvlars``        no              none          10              everywhere       none
    ``apex``          yes             1             none            weight_decay > 0 none
    ``lambc``         yes             none          none            everywhere       1
    ================= =============== ============= =============== ================ =========

    Sources:

    - ``nus``: NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch.
    - ``paper``: algorithm 2 of the paper, and optax.lamb.
    - ``tvlars``: KhoiDOO/tvlars and cybertronai/pytorch-lamb.
    - ``apex``: FusedLAMB of NVIDIA apex and Lamb of timm with their default settings.
    - ``lambc``: the rule of the paper with the ratio clipped at 1 (trust_clip of timm).

    Deliberate difference from the NUS code: ``p.grad`` does not change; the clipping is part of the
    step.

    Args:
        params: Parameters or parameter groups; `parameter_groups` builds the usual two groups.
        lr: Learning rate, a float or a 0-dim tensor.
        betas: Decay rates of the averages of the gradient and of its square.
        eps: Added to √v̂.
        weight_decay: Weight decay.
        form: The name of the rule. Options that are given explicitly override those of the form.
        bias_correction: Whether m and v are corrected for their start at 0; None: as in the form.
        max_grad_norm: Bound of the norm over all gradients of this optimizer; None: no bound;
            "form": that of the form. Inside ZeroRedundancyOptimizer, each rank sees only the
            gradients of its own share. There, use None and `torch.nn.utils.clip_grad_norm_`.
        max_weight_norm: Bound of ‖w‖ in the ratio; None: no bound; "form": that of the form.
        max_ratio: Upper bound of the ratio; None: no bound; "form": that of the form.
        always_adapt: Whether groups without weight decay have a trust ratio too; None: as in the
            form.
        decoupled_weight_decay: True: the decay is part of u, as in AdamW. False: it is added to
            the gradient, as in Adam.
        adapt: Whether to use a trust ratio; usually set per group. Without it, ``paper`` equals
            `torch.optim.AdamW`, or `torch.optim.Adam` with decoupled_weight_decay=False.
        nonfinite: What to do with a gradient whose norm is not finite, as in `LARS`: "propagate"
            makes the weights nan, "skip" leaves the tensor and its state as they are. With
            max_grad_norm one such gradient affects all tensors, because the global norm is not
            finite either.
        path: The implementation: "loop", one tensor at a time; "fused", compiled CPU kernels;
            "foreach", for accelerators and `torch.compile`; "auto", the fastest for the device.
            Their results agree to rounding.

    Raises:
        ValueError: A name is unknown, or a value is out of range.
        TypeError: A value is not a number, or betas are not two numbers.

    References:
        You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
        arXiv 1904.00962.
    """

    buffers = ("exp_avg", "exp_avg_sq", "step")

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
        defaults = with_form(defaults_from(locals()), LAMB_FORMS, FORM_DEFAULTS)
        super().__init__(*params_and_defaults(params, defaults))

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        check_not_negative(group, "lr", "eps", "weight_decay")
        check_bound(group, *bounds_of(FORM_DEFAULTS))
        check_choices(group, CHOICES)
        check_betas(group["betas"])

    def _completed(self, group: dict[str, Any]) -> dict[str, Any]:
        return group_with_form(super()._completed(group), LAMB_FORMS, FORM_DEFAULTS)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of LAMB or of AdamW, of this library, torch, timm, apex and others.

        Options that its groups lack keep their values. A step count in a group, as in timm and
        apex, becomes that of each parameter.

        Raises:
            ValueError: As in `LayerwiseOptimizer.load_state_dict`.
        """
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "step" in state:  # a plain number in the NUS code, and in torch before 1.12
                step = torch.as_tensor(state["step"], dtype=torch.float32)
                state["step"] = step.reshape(())

    @torch.no_grad()
    def last_ratios(self, group: dict[str, Any], params: Tensors, weights: Tensors) -> Tensor:
        """The trust ratios of the last step; see `LayerwiseOptimizer.last_ratios`."""
        averages, squares, steps = ([self.state[p][name] for p in params] for name in self.buffers)
        rule = self._rule(group, clip=None)
        return last_adam_ratios(weights, averages, squares, steps, rule)

    def _step_groups(self) -> None:
        found = [self._with_grads(group) for group in self.param_groups]
        clips = self._clip_coefficients(found)
        for group, (params, grads) in zip(self.param_groups, found, strict=True):
            states = [self._state_of(p) for p in params]
            state_lists = [[state[name] for state in states] for name in self.buffers]
            rule = self._rule(group, clips.get(group["max_grad_norm"]))
            apply_rule(PATHS, group["path"], (params, grads, *state_lists), rule)

    def _clip_coefficients(self, found: list[tuple[Tensors, Tensors]]) -> dict[float, Tensor]:
        """The factor of the gradients for each ``max_grad_norm`` of the groups."""
        # The update walks the tensors forwards. The norm walks them backwards, so the tensors that
        # it reads last are still in the cache of a CPU when the update begins.
        params = [param for params, _ in found for param in params][::-1]
        grads = [grad for _, grads in found for grad in grads][::-1]
        bounds = {group["max_grad_norm"] for group in self.param_groups if grads} - {None}
        if not bounds:
            return {}
        total = total_norm(params, grads)
        return {bound: clip_coefficient(total, bound) for bound in bounds}

    def _rule(self, group: dict[str, Any], clip: Tensor | None) -> AdamRule:
        adapt = group["adapt"] and (group["always_adapt"] or group["weight_decay"] != 0)
        beta1, beta2 = group["betas"]
        computed = {"adapt": adapt, "clip": clip, "found_inf": self.found_inf}
        return rule_of(AdamRule, group, beta1=beta1, beta2=beta2, **computed)

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        elif state["step"].device != param.device:  # loaded from a checkpoint mapped to the CPU
            state["step"] = state["step"].to(param.device)
        return cast(dict[str, Tensor], state)


def check_betas(betas: Any) -> None:
    """Raise unless ``betas`` are two numbers in [0, 1)."""
    if not isinstance(betas, tuple | list):
        raise TypeError(f"betas={betas!r} must be two numbers in [0, 1)")
    for beta in betas:
        check_number("betas", beta)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas} must be two numbers in [0, 1)")


def total_norm(params: Tensors, grads: Tensors) -> Tensor:
    """L2 norm over the gradients of these parameters, a 0-dim tensor on the device of the first."""
    parts = []
    for (device, *_), which in by_kind(grads).items():
        part = norm_of_one_kind(pick(params, which), pick(grads, which), device)
        if hasattr(part, "full_tensor"):  # a DTensor, which cannot be stacked with other tensors
            part = part.full_tensor()
        parts.append(part.to(grads[0].device))
    return vector_norm(torch.stack(parts))


def norm_of_one_kind(params: Tensors, grads: Tensors, device: torch.device) -> Tensor:
    """L2 norm over gradients that share a device and dtype."""
    if choose_path(device) == "fused" and all(kernels.takes_all(params, grads)):
        squares = kernels.squares(grads)
        if squares is not None:
            return torch.tensor(squares, dtype=torch.float64).sum().sqrt()
    return vector_norm(norms(grads))


def clip_coefficient(total: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (total + 1e-6)), a 0-dim tensor; nan if the norm is not finite."""
    return torch.where(total.isfinite(), (max_norm / (total + 1e-6)).clamp(max=1.0), math.nan)


def create_lamb_optimizer(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    exclude_layers: str | Collection[str] = ("bn", "ln", "bias"),
    **options: Any,
) -> LAMB:
    """Create a `LAMB` optimizer for a model.

    Args:
        model: The model.
        lr: Learning rate.
        betas: Decay rates of the averages of the gradient and of its square.
        eps: ``eps`` of `LAMB`.
        weight_decay: Weight decay of the adapted parameters.
        exclude_layers: The layers that get neither weight decay nor a trust ratio: "bn", "ln",
            "norm" or "bias". As in the NUS code, any of them excludes norm layers of every kind,
            and "bias" excludes biases too. `parameter_groups` has finer choices.
        **options: Further arguments of `LAMB`.

    Raises:
        ValueError: A word is unknown, or a value is out of range.
    """
    layers = words(exclude_layers, "exclude_layers", ("bn", "ln", "norm", "bias"))
    exclude = ["norm"] if layers else []
    if "bias" in layers:
        exclude.append("bias")
    groups = parameter_groups(model, weight_decay, exclude=exclude)
    return LAMB(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)
