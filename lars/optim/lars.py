"""LARS: layer-wise adaptive rate scaling, in the forms of papers and published projects."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lars.names import LARS_FORMS
from lars.optim.base import LayerwiseOptimizer, apply_rule, rule_of
from lars.optim.cpu.fused import sgd_fused
from lars.optim.groups import excluded_kinds, parameter_groups
from lars.optim.options import (
    CHOICES,
    bounds_of,
    check_bound,
    check_choices,
    check_not_negative,
    defaults_from,
    group_with_form,
    params_and_defaults,
    with_form,
)
from lars.optim.steps.sgd import SGDRule, sgd_foreach, sgd_loop, sgd_ratios
from lars.optim.steps.tensors import Tensors

PATHS = {"loop": sgd_loop, "fused": sgd_fused, "foreach": sgd_foreach}
# The options that a form can set, with their values where it does not.
FORM_DEFAULTS: dict[str, Any] = {
    "trust_coefficient": 1e-3,
    "eps": 0.0,
    "inside": "none",
    "denominator": "split",
    "max_ratio": None,
    "max_element": None,
    "trust_clip": False,
    "zero_norm": "one",
}
LARS_CHOICES = CHOICES | {
    "inside": ("none", "ratio", "both"),
    "denominator": ("split", "joint", "momentum"),
    "zero_norm": ("one", "raw", "formula"),
}


class LayerwiseSGD(LayerwiseOptimizer):
    """The update that `LARS` and `TVLARS` share: an `SGDRule` for each group."""

    buffers = ("momentum_buffer",)

    def _rule(self, group: dict[str, Any]) -> SGDRule:
        """The rule of a group in this step."""
        raise NotImplementedError

    def _step_group(self, group: dict[str, Any], params: Tensors, grads: Tensors) -> None:
        sgd_step(self.state, params, grads, self._rule(group), group["path"])

    @torch.no_grad()
    def last_ratios(self, group: dict[str, Any], params: Tensors, weights: Tensors) -> Tensor:
        """The trust ratios of the last step; see `LayerwiseOptimizer.last_ratios`."""
        rule = self._rule(group).on(weights[0].device)
        return sgd_ratios(weights, [cast(Tensor, p.grad) for p in params], rule)


class LARS(LayerwiseSGD):
    r"""SGD with momentum and a separate learning rate for every layer.

    For each tensor w with gradient g and momentum buffer b (zeros before the first step):

        d     = clamp(g + weight_decay * w, ±max_element)
        ratio = trust_coefficient * ‖w‖ / denominator            at most max_ratio
        b     = momentum * b + inside * d
        w     = w - outside * b,                                 inside * outside = lr * ratio

    The published rules called LARS differ in the denominator, and in whether lr and ratio are
    applied before ("inside") or after ("outside") the momentum buffer. If both are outside, the
    current rate and ratio multiply the whole history of gradients. If they are inside, each
    gradient keeps the rate and ratio of its own step. The forms agree as long as the rate is
    constant and the ratio moves slowly. They differ during warm-up and decay, so a recipe tuned for
    one form does not carry over to another.

    They also differ after an outlier among the gradients. With ``inside="none"``, as in ``nus``, the
    ratio of the next ordinary gradient multiplies the outlier in the buffer: one gradient that is
    100 times as large makes a step 35 times as large as an ordinary one, nearly as in plain SGD.
    ``mlperf``, ``optax``, ``torchlars`` and ``barlowtwins`` scale the outlier by its own ratio, and
    take an ordinary step. With ``nus``, clip the norm of the gradients. docs/optimizers.md has the
    measured table.

    The forms:

    ================= ============================= ======== =====================================
    form              denominator                   inside   other options
    ================= ============================= ======== =====================================
    ``nus`` (default) ‖g‖ + wd ‖w‖ + eps            nothing  max_ratio 50, max_element 10
    ``mlperf``        ‖g‖ + wd ‖w‖ + eps            lr·ratio
    ``optax``         ‖g + wd w‖ + eps              lr·ratio
    ``torchlars``     ‖g‖ + wd ‖w‖ + eps            ratio    eps 1e-8
    ``barlowtwins``   ‖g + wd w‖ + eps              ratio
    ``larc``          ‖g‖ + wd ‖w‖ + eps            ratio    ratio min(ratio, lr) / lr, eps 1e-8,
                                                             trust_coefficient 0.02
    ``cmpark``        ‖g‖ + momentum ‖w‖ + eps      nothing  trust_coefficient 1
    ``cmpark-inside`` ‖g‖ + momentum ‖w‖ + eps      lr·ratio trust_coefficient 1
    ================= ============================= ======== =====================================

    Sources:

    - ``nus``: NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch. It is the default because ImageNet results of
      up to 77.4 % at batch sizes from 512 to 32K were published for it.
    - ``mlperf``: algorithm 1 of the LARS paper, TensorFlow, and the MLPerf reference.
    - ``optax``: optax.lars.
    - ``torchlars``: kakaobrain/torchlars around SGD. With always_adapt=False it is the rule of Lars
      of timm, and with eps=0 that of SGDwFASTLARS of MXNet.
    - ``barlowtwins``: Barlow Twins and VISSL of facebookresearch, and KhoiDOO/tvlars.
    - ``larc``: LARC of NVIDIA apex; trust_clip=False corresponds to its clip=False.
    - ``cmpark``: the version of cmpark0126/pytorch-LARS that produced its result tables.
      ``cmpark-inside`` is the first optimizer of that repository. Its latest version scales the
      momentum buffer in place, which is a defect, and is not available here.

    Deliberate differences from the published code, for every form:

    - An excluded group (``adapt=False``) has ratio 1 and the weight decay of the group. The NUS
      code silently applies no weight decay. `parameter_groups` sets it to 0, which gives the same
      numbers.
    - A nonfinite gradient never gets the ratio 1. In the NUS code it does, because comparisons with
      a nan norm are false. See ``nonfinite``.
    - ``larc`` at lr = 0 uses the unclipped ratio. The published min(ratio / lr, 1) would put the
      unscaled gradient, which is hundreds of times too large, into the momentum buffer.
    - ``cmpark`` gives ratio 0 instead of nan for 0 / 0.

    Args:
        params: Parameters or parameter groups; `parameter_groups` builds the usual two groups.
        lr: Learning rate: a float, or a 0-dim tensor, which a CUDA graph or a compiled step reads
            again in each step.
        momentum: Momentum factor.
        weight_decay: Weight decay (coupled: it enters the momentum buffer).
        trust_coefficient: η of the papers; None: that of the form, 1e-3 unless the table names one.
        eps: Added to the denominator; None: that of the form, 0 unless the table names one.
        form: The name of the rule. Options that are given explicitly override those of the form.
        inside: What is applied before the momentum buffer: "none", "ratio" or "both"; None: that of
            the form.
        denominator: "split": ‖g‖ + weight_decay ‖w‖; "joint": ‖g + weight_decay w‖; "momentum":
            ‖g‖ + momentum ‖w‖; None: that of the form.
        max_ratio: Upper bound of the ratio; None: no bound; "form": that of the form.
        max_element: Bound of each element of g + weight_decay w, with or without a trust ratio;
            None: no bound; "form": that of the form.
        trust_clip: Whether the ratio is min(ratio, lr) / lr; None: as in the form.
        zero_norm: What happens where ‖w‖ or ‖g‖ (‖g + weight_decay w‖ for "joint") is 0. "one":
            ratio 1, a plain SGD step at the full lr. "raw": the same without weight decay.
            "formula": the quotient is used as it is, so a zero weight never moves. None: that of
            the form, which is "one", except "raw" for larc and "formula" for both cmpark forms.
        nesterov: Nesterov momentum, as in `torch.optim.SGD`.
        maximize: Maximize the objective, as in `torch.optim.SGD`.
        always_adapt: Whether groups without weight decay have a trust ratio too. timm, bolts,
            lightly and torch_optimizer use none there, which is False.
        adapt: Whether to use a trust ratio; usually set per group.
        nonfinite: What to do with a tensor whose gradient has a nonfinite norm. "propagate"
            (default): the whole tensor becomes nan. A trainer then sees a nan loss in the next step
            and can stop while its last checkpoint is intact, instead of training on bad weights.
            "skip": neither the tensor nor its buffer changes in this step, for runs that expect
            a rare overflow.
        path: The implementation: "loop", one tensor at a time; "fused", compiled CPU kernels;
            "foreach", for accelerators and `torch.compile`; "auto", the fastest for the device.
            Their results agree to rounding.

    Raises:
        ValueError: A name is unknown, or a value is out of range.
        TypeError: A value is not a number.

    References:
        You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", arXiv 1708.03888.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        trust_coefficient: float | None = None,
        eps: float | None = None,
        *,
        form: str = "nus",
        inside: str | None = None,
        denominator: str | None = None,
        max_ratio: float | Literal["form"] | None = "form",
        max_element: float | Literal["form"] | None = "form",
        trust_clip: bool | None = None,
        zero_norm: str | None = None,
        nesterov: bool = False,
        maximize: bool = False,
        always_adapt: bool = True,
        adapt: bool = True,
        nonfinite: str = "propagate",
        path: str = "auto",
    ) -> None:
        defaults = with_form(defaults_from(locals()), LARS_FORMS, FORM_DEFAULTS)
        super().__init__(*params_and_defaults(params, defaults))

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        check_not_negative(group, "lr", "momentum", "weight_decay", "trust_coefficient", "eps")
        check_bound(group, *bounds_of(FORM_DEFAULTS))
        check_choices(group, LARS_CHOICES)
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("nesterov=True needs a momentum above 0")

    def _completed(self, group: dict[str, Any]) -> dict[str, Any]:
        return group_with_form(super()._completed(group), LARS_FORMS, FORM_DEFAULTS)

    def _rule(self, group: dict[str, Any]) -> SGDRule:
        adapt = group["adapt"] and (group["always_adapt"] or group["weight_decay"] != 0)
        return rule_of(SGDRule, group, adapt=adapt, found_inf=self.found_inf)


def sgd_step(
    state: MutableMapping[Tensor, Any],
    params: Tensors,
    grads: Tensors,
    rule: SGDRule,
    path: str = "auto",
) -> None:
    """Update parameters, and their momentum buffers in the state of an optimizer, in place."""
    buffers = momentum_buffers(state, params) if rule.momentum else []
    apply_rule(PATHS, path, (params, grads, buffers), rule)


def momentum_buffers(state: MutableMapping[Tensor, Any], params: Tensors) -> Tensors:
    """The momentum buffers of the parameters; a missing buffer is created with zeros."""
    buffers = []
    for p in params:
        own = state[p]
        buffer = own.get("momentum_buffer")
        if buffer is None:
            buffer = own["momentum_buffer"] = torch.zeros_like(p)
        buffers.append(buffer)
    return buffers


def usual_eps(form: str) -> float | None:
    """The ``eps`` of published runs with a form: 1e-5 for ``nus``, None (as in the form) otherwise."""
    return 1e-5 if form == "nus" else None


def create_optimizer_lars(
    model: nn.Module,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    bn_bias_separately: bool = True,
    epsilon: float | None = None,
    **options: Any,
) -> LARS:
    """Create a `LARS` optimizer for a model.

    Args:
        model: The model.
        lr: Learning rate.
        momentum: Momentum factor.
        weight_decay: Weight decay of the adapted parameters.
        bn_bias_separately: Whether norms and biases get neither weight decay nor a trust ratio.
        epsilon: ``eps`` of `LARS`; both names work. None: 1e-5 for the form ``nus``, as in all its
            published runs except the one at batch 32K, which uses 0; the value of the form for
            other forms.
        **options: Further arguments of `LARS`.

    Raises:
        TypeError: Both ``epsilon`` and ``eps`` are given, or `LARS` does not have an option.
        ValueError: A value is out of range.
    """
    if "eps" in options:
        if epsilon is not None:
            raise TypeError("epsilon and eps are the same option; give one of them")
        epsilon = options.pop("eps")
    if epsilon is None:
        epsilon = usual_eps(options.get("form", "nus"))
    groups = parameter_groups(model, weight_decay, exclude=excluded_kinds(bn_bias_separately))
    return LARS(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, eps=epsilon, **options)
