"""LARS: layer-wise adaptive rate scaling, in the forms that papers and projects have given it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lars.optim.groups import (
    check_bound,
    check_choice,
    check_not_negative,
    excluded_kinds,
    form_options,
    keep_options,
    options_of,
    parameter_groups,
    with_grads,
)
from lars.optim.update import Rule, update

# The options that make a form, with their values where a form says nothing.
PLAIN: dict[str, Any] = {
    "trust_coefficient": 1e-3,
    "eps": 0.0,
    "inside": "none",
    "denominator": "split",
    "max_ratio": None,
    "max_element": None,
    "trust_clip": False,
    "zero_norm": "one",
}
FORMS: dict[str, dict[str, Any]] = {
    "nus": {"max_ratio": 50.0, "max_element": 10.0},
    "mlperf": {"inside": "both"},
    "optax": {"inside": "both", "denominator": "joint"},
    "torchlars": {"inside": "ratio", "eps": 1e-8},
    "barlowtwins": {"inside": "ratio", "denominator": "joint"},
    "larc": {
        "inside": "ratio",
        "trust_coefficient": 0.02,
        "eps": 1e-8,
        "trust_clip": True,
        "zero_norm": "raw",
    },
    "cmpark": {"denominator": "momentum", "trust_coefficient": 1.0, "zero_norm": "formula"},
    "cmpark-inside": {
        "inside": "both",
        "denominator": "momentum",
        "trust_coefficient": 1.0,
        "zero_norm": "formula",
    },
}
CHOICES = {
    "inside": ("none", "ratio", "both"),
    "denominator": ("split", "joint", "momentum"),
    "zero_norm": ("one", "raw", "formula"),
    "nonfinite": ("propagate", "skip"),
    "path": ("auto", "loop", "fused", "foreach"),
}


class LayerwiseSGD(Optimizer):
    """The step that `LARS` and `TVLARS` share: a `Rule` for each group, carried out by `update`."""

    def _rule(self, group: dict[str, Any]) -> Rule:
        """The rule of a group in this step; called once per step and group."""
        return Rule(**{name: group[name] for name in Rule.__slots__ if name in group})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; options that its groups lack (plain SGD's, for one) stay as they are."""
        before = self.param_groups
        super().load_state_dict(state_dict)
        keep_options(self.param_groups, before)

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
        for group in self.param_groups:
            params = with_grads(group, type(self).__name__)
            grads = [cast(Tensor, p.grad) for p in params]
            buffers = momentum_buffers(self.state, params) if group["momentum"] else []
            update(params, grads, buffers, self._rule(group), group["path"])
        return loss


class LARS(LayerwiseSGD):
    r"""SGD with momentum in which every layer has a learning rate of its own.

    For each tensor w with gradient g and momentum buffer b (zeros before the first step):

        d     = clamp(g + weight_decay * w, ±max_element)
        ratio = trust_coefficient * ‖w‖ / denominator            at most max_ratio
        b     = momentum * b + inside * d
        w     = w - outside * b,                                 inside * outside = lr * ratio

    The published rules called LARS differ in what the denominator is and in which of lr and ratio
    stand inside the momentum buffer. Where both stand outside, today's rate and ratio multiply the
    whole history of gradients; where they stand inside, each gradient keeps the rate and ratio of
    its own step. At constant rate and slowly moving ratio the forms agree; in warm-up and decay
    they do not, and a recipe tuned for one is not a recipe for another. So each has a name:

    ================= ============================= ======== =====================================
    form              denominator                   inside   further
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

    Sources: ``nus``: NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch, whose ImageNet results to 77.4 % at
    batches of 512 to 32K were made with it, and which is the default for that reason. ``mlperf``:
    the LARS paper's algorithm 1, TensorFlow's and MLPerf's reference. ``optax``: optax.lars.
    ``torchlars``: kakaobrain/torchlars around SGD; timm's Lars and, with eps=0, MXNet's
    SGDwFASTLARS are the same rule. ``barlowtwins``: facebookresearch's Barlow Twins and VISSL, and
    KhoiDOO/tvlars. ``larc``: NVIDIA apex's LARC; trust_clip=False is its clip=False. ``cmpark``:
    cmpark0126/pytorch-LARS as it was when its tables were made, ``cmpark-inside`` its first
    optimizer. That repository's last state, which scales the momentum buffer in place, is a defect
    and is not offered.

    Deliberate differences from the published code, for every form:

    - An excluded group (``adapt=False``) has ratio 1 and the weight decay that the group says. In
      the NUS code it silently has none; `parameter_groups` sets 0, which gives the same numbers.
    - A gradient that is not finite never gets the ratio 1, as it does in the NUS code (nan norms
      compare false there); see ``nonfinite``.
    - ``larc`` at lr = 0 uses the unclipped ratio. The published min(ratio / lr, 1) would let the
      raw gradient, hundreds of times too large, into the momentum buffer.
    - ``cmpark`` gives ratio 0 for 0 / 0 in place of nan.

    Args:
        params: Parameters or parameter groups; see `parameter_groups` for the usual two.
        lr: Learning rate; a float, or a 0-dim tensor, which a CUDA graph or a compiled step can
            read anew at each step.
        momentum: Momentum factor.
        weight_decay: Weight decay (coupled: it enters the momentum buffer).
        trust_coefficient: η of the papers; None: the form's, which is 1e-3 unless named above.
        eps: Added to the denominator; None: the form's, which is 0 unless named above.
        form: The named rule. Options given beside it take precedence over what it sets.
        inside: What stands inside the momentum buffer: "none", "ratio" or "both"; None: the form's.
        denominator: "split": ‖g‖ + weight_decay ‖w‖; "joint": ‖g + weight_decay w‖; "momentum":
            ‖g‖ + momentum ‖w‖; None: the form's.
        max_ratio: Upper bound of the ratio; None: no bound; "form": the form's.
        max_element: Bound of each element of g + weight_decay w, also without a ratio; None: no
            bound; "form": the form's.
        trust_clip: Whether the ratio becomes min(ratio, lr) / lr; None: the form's.
        zero_norm: What happens where ‖w‖ or ‖g‖ (‖g + weight_decay w‖ for "joint") is 0. "one":
            ratio 1, a plain SGD step at the full lr. "raw": the same without weight decay.
            "formula": the quotient as it stands, so that a zero weight never moves. None: the
            form's, which is "one", for larc "raw" and for both cmpark "formula".
        nesterov: Nesterov momentum, as in `torch.optim.SGD`.
        maximize: Maximize the objective, as in `torch.optim.SGD`.
        adapt: Whether there is a trust ratio; usually set per group.
        nonfinite: What happens to a tensor whose gradient has a norm that is not finite.
            "propagate" (default): the whole tensor becomes nan. A trainer then sees a nan loss in
            the next step and can stop with its last checkpoint intact; a run that goes on as if
            nothing had happened is worse. "skip": neither the tensor nor its buffer changes in
            this step, for runs in which a rare overflow is expected.
        path: How to compute: "loop", tensor by tensor; "fused", compiled kernels for CPUs;
            "foreach", for accelerators and `torch.compile`; "auto", the fastest for the device.
            The result is the same to rounding.

    Raises:
        ValueError: A name is not known, or a value is out of range.
        TypeError: A value is no number.

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
        adapt: bool = True,
        nonfinite: str = "propagate",
        path: str = "auto",
    ) -> None:
        said = {
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "inside": inside,
            "denominator": denominator,
            "trust_clip": trust_clip,
            "zero_norm": zero_norm,
        }
        bounds = {"max_ratio": max_ratio, "max_element": max_element}
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "form": form,
            **form_options(form, FORMS, PLAIN),
            **{name: value for name, value in said.items() if value is not None},
            **{name: value for name, value in bounds.items() if value != "form"},
            "nesterov": nesterov,
            "maximize": maximize,
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
        check_not_negative(group, "lr", "momentum", "weight_decay", "trust_coefficient", "eps")
        check_bound(group, "max_ratio", "max_element")
        for name, choices in CHOICES.items():
            check_choice(name, group[name], choices)
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("nesterov=True needs a momentum above 0")


def momentum_buffers(state: MutableMapping[Tensor, Any], params: list[Tensor]) -> list[Tensor]:
    """The parameters' momentum buffers in an optimizer's state, zeros where there is none yet."""
    for p in params:
        if state[p].get("momentum_buffer") is None:
            state[p]["momentum_buffer"] = torch.zeros_like(p)
    return [state[p]["momentum_buffer"] for p in params]


def usual_eps(form: str) -> float | None:
    """The ``eps`` that runs with a form have: 1e-5 for ``nus``, None, the form's own, for another."""
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
    """`LARS` over a model.

    Args:
        model: The model.
        lr: Learning rate.
        momentum: Momentum factor.
        weight_decay: Weight decay of the adapted parameters.
        bn_bias_separately: Whether norms and biases get neither weight decay nor trust ratio.
        epsilon: ``eps`` of `LARS`; None: 1e-5 for the form ``nus``, as in all its published runs but
            that at 32K (0), and another form's own.
        **options: Further arguments of `LARS`.
    """
    if epsilon is None:
        epsilon = usual_eps(options.get("form", "nus"))
    groups = parameter_groups(model, weight_decay, exclude=excluded_kinds(bn_bias_separately))
    return LARS(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, eps=epsilon, **options)
