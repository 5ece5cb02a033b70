"""LARS: layer-wise adaptive rate scaling, in the forms that papers and projects have given it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lars.optim.groups import parameter_groups
from lars.optim.update import Rule, apply

# The options that make a form, and their values where a form does not say otherwise.
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
    "cmpark-v1": {
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


class LARS(Optimizer):
    """SGD with momentum whose every layer has a learning rate of its own."""

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
        options = form_options(form) | {k: v for k, v in said.items() if v is not None}
        if max_ratio != "form":
            options["max_ratio"] = max_ratio
        if max_element != "form":
            options["max_element"] = max_element
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "form": form,
            "nesterov": nesterov,
            "maximize": maximize,
            "adapt": adapt,
            "nonfinite": nonfinite,
            "path": path,
            **options,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one that names a ``form`` of its own gets that form's options where it does not set them."""
        if "form" in param_group:
            param_group = form_options(param_group["form"]) | param_group
        super().add_param_group(param_group)
        _check(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Evaluates the model and returns the loss; gradients are enabled while it runs.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = with_grads(group, type(self).__name__)
            grads = [p.grad for p in params]
            buffers = [self._momentum_buffer(p) for p in params] if group["momentum"] else []
            apply(params, grads, buffers, self._rule(group), group["path"])
        return loss

    def _rule(self, group: dict[str, Any]) -> Rule:
        return Rule(**{name: group[name] for name in Rule.__slots__ if name in group})

    def _momentum_buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        return state["momentum_buffer"]


def create_optimizer_lars(
    model: nn.Module,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    bn_bias_separately: bool = True,
    epsilon: float = 1e-5,
    **options: Any,
) -> LARS:
    """`LARS` over a model, with biases and norms excluded from weight decay and trust ratio.

    Args:
        model: The model.
        lr: Learning rate.
        momentum: Momentum factor.
        weight_decay: Weight decay of the adapted parameters.
        bn_bias_separately: Whether biases and norms are excluded, see `parameter_groups`.
        epsilon: ``eps`` of `LARS`.
        **options: Further arguments of `LARS`.
    """
    groups = parameter_groups(model, weight_decay, bn_bias_separately=bn_bias_separately)
    return LARS(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, eps=epsilon, **options)


def form_options(form: str) -> dict[str, Any]:
    """Every option of a named form."""
    if form not in FORMS:
        raise ValueError(f"form={form!r} is not known; choose one of: {', '.join(FORMS)}")
    return PLAIN | FORMS[form]


def with_grads(group: dict[str, Any], who: str) -> list[Tensor]:
    """The parameters of a group that have a gradient.

    Raises:
        RuntimeError: A gradient is sparse: a trust ratio needs the whole layer.
    """
    params = [p for p in group["params"] if p.grad is not None]
    if any(p.grad.layout != torch.strided for p in params):
        raise RuntimeError(
            f"{who} does not take sparse gradients; use sparse=False in the embedding, "
            "or give these parameters to torch.optim.SparseAdam"
        )
    return params


def _check(group: dict[str, Any]) -> None:
    for name in ("lr", "momentum", "weight_decay", "trust_coefficient", "eps"):
        if not group[name] >= 0:
            raise ValueError(f"{name}={group[name]} must not be negative")
    for name in ("max_ratio", "max_element"):
        if group[name] is not None and not group[name] > 0:
            raise ValueError(f"{name}={group[name]} must be positive, or None for no bound")
    for name, choices in CHOICES.items():
        if group[name] not in choices:
            raise ValueError(
                f"{name}={group[name]!r} is not known; choose one of: {', '.join(choices)}"
            )
    if group["nesterov"] and not group["momentum"]:
        raise ValueError("nesterov=True needs a momentum above 0")
