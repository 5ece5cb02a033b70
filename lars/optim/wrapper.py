"""LARS around any torch optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer

from lars.optim.base import (
    LayerwiseOptimizer,
    class_name,
    class_named,
    step_unless,
    takes_found_inf,
)
from lars.optim.foreign import own_names, own_state
from lars.optim.lars import sgd_step
from lars.optim.options import check_not_negative
from lars.optim.steps.sgd import SGDRule
from lars.optim.steps.tensors import Tensors, by_kind, norms, pick, scaled
from lars.optim.steps.trust import trust_ratios


class LARSWrapper(LayerwiseOptimizer):
    r"""Any torch optimizer, applied to gradients that include weight decay and a trust ratio.

    For each tensor w with gradient g, the wrapped optimizer gets the following gradient, and the
    weight decay 0:

        trust_coef * ‖w‖ / (‖g‖ + weight_decay * ‖w‖ + eps) * (g + weight_decay * w)

    The factor is 1 if ‖w‖ or ‖g‖ is 0. Around SGD this is the form ``torchlars`` of `LARS`. The
    rule is that of kakaobrain/torchlars.

    The wrapper is an Optimizer. Schedulers, hooks, ``state_dict``, ``add_param_group``, closures,
    pickle, deepcopy, GradScaler and Horovod's wrapper work with it. Give them the wrapper and not
    the wrapped optimizer; both share the same groups and state.

    Deliberate differences from torchlars: ``p.grad`` does not change; gradients that a closure
    computes are adapted too; a group with ``adapt=False`` is passed on unchanged; around
    `hvd.DistributedOptimizer` the wrapper first waits for the averaged gradients. If the norm of a
    gradient is not finite, the whole update of the tensor becomes nan.

    Example:
        base_optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = LARSWrapper(optimizer=base_optimizer, eps=1e-8, trust_coef=0.001)

    Args:
        optimizer: The optimizer to wrap, or the parameter groups of another LARSWrapper. From such
            groups, the wrapped optimizer is rebuilt with their eps and trust_coef. Horovod's wrapper
            rebuilds an optimizer in this way.
        eps: Added to the denominator.
        trust_coef: The trust coefficient.

    Raises:
        ValueError: eps or trust_coef is negative.
        TypeError: The optimizer evaluates its closure several times per step (LBFGS), has a trust
            ratio already (LARS, LAMB, TVLARS), or has complex parameters.
    """

    def __init__(
        self,
        optimizer: Optimizer | list[dict[str, Any]],
        eps: float = 1e-8,
        trust_coef: float = 0.001,
    ) -> None:
        check_not_negative({"eps": eps, "trust_coef": trust_coef}, "eps", "trust_coef")
        base = optimizer if isinstance(optimizer, Optimizer) else _rebuilt(optimizer)
        if isinstance(base, LBFGS):
            raise TypeError(
                "LARSWrapper does not take LBFGS: it re-evaluates its closure in a step"
            )
        if isinstance(base, LayerwiseOptimizer):
            raise TypeError(
                f"LARSWrapper does not take {type(base).__name__}, which has a trust ratio already"
            )
        for group in base.param_groups:
            renamed = dict(own_names(group, ("adapt",)))
            group.clear()
            group.update(renamed)
        own = {"lars_eps": eps, "trust_coef": trust_coef, "base": class_name(type(base))}
        if base is optimizer:
            for group in base.param_groups:
                if "base" in group:  # it was wrapped before
                    group.update(own)
        else:
            own = {name: base.param_groups[0][name] for name in own}
        base.defaults.update(own)
        super().__init__(base.param_groups, base.defaults)
        self._share(base)

    def _share(self, base: Optimizer) -> None:
        """Use the groups, state and defaults of the wrapped optimizer, not copies of them."""
        self.base = base
        self.defaults, self.state, self.param_groups = base.defaults, base.state, base.param_groups

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base" in state:
            self._share(state["base"])
            super().__setstate__(state)
        else:  # from load_state_dict: groups and state alone, which the base may have to convert
            self.base.__setstate__(state)
            self._share(self.base)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer. A group that is refused is not added."""
        if "base" in self.__dict__:
            self.base.add_param_group(own_names(param_group, ("adapt",)))
            try:
                self._check(self.param_groups[-1])
            except (TypeError, ValueError):
                self.param_groups.pop()
                raise
        else:  # called by Optimizer's constructor with groups that the base already has
            super().add_param_group(param_group)

    def _completed(self, group: dict[str, Any]) -> dict[str, Any]:
        return group  # the wrapped optimizer has completed it

    def _translated(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        if type(self.base) is not SGD:
            return state_dict
        buffers = ("momentum_buffer",)
        return own_state(
            state_dict, owner="LARSWrapper(SGD)", buffers=buffers, options=self.defaults
        )

    @property
    def takes_found_inf(self) -> bool:
        """Whether `found_inf` has an effect: around SGD without dampening, and around fused optimizers."""
        return self._is_plain_sgd or takes_found_inf(self.base)

    @property
    def _is_plain_sgd(self) -> bool:
        return type(self.base) is SGD and not any(group["dampening"] for group in self.param_groups)

    def _step_groups(self) -> None:
        if self._is_plain_sgd:
            super()._step_groups()
        elif self.found_inf is not None:
            if not self.takes_found_inf:
                raise RuntimeError(
                    f"LARSWrapper around {type(self.base).__name__} does not know found_inf: give the wrapped "
                    "optimizer fused=True"
                )
            with self._adapted_gradients():
                step_unless(self.found_inf, self.base)
        elif hasattr(self.base, "skip_synchronize"):  # hvd.DistributedOptimizer
            distributed = cast(Any, self.base)
            distributed.synchronize()
            with distributed.skip_synchronize(), self._adapted_gradients():
                distributed.step()
        else:
            with self._adapted_gradients():
                self.base.step()

    def _step_group(self, group: dict[str, Any], params: Tensors, grads: Tensors) -> None:
        """The step of SGD with the ratio before the momentum buffer, without extra gradients."""
        rule = SGDRule(
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            trust_coefficient=group["trust_coef"],
            eps=group["lars_eps"],
            inside="ratio",
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            adapt=group.get("adapt", True),
            found_inf=self.found_inf,
        )
        sgd_step(self.state, params, grads, rule)

    @torch.no_grad()
    def last_ratios(self, group: dict[str, Any], params: Tensors, weights: Tensors) -> Tensor:
        """The trust ratios of the last step; see `LayerwiseOptimizer.last_ratios`."""
        if not group.get("adapt", True):
            return torch.ones(len(weights), device=weights[0].device)
        return wrapper_ratios(weights, [cast(Tensor, p.grad) for p in params], group)

    @contextlib.contextmanager
    def _adapted_gradients(self) -> Iterator[None]:
        """Replace p.grad by adapted gradients, and the weight decay by 0, within the context."""
        grads: list[tuple[Tensor, Tensor]] = []
        decays = [group.get("weight_decay", 0.0) for group in self.param_groups]
        try:
            for group in self.param_groups:
                if group.get("adapt", True):
                    params, own = self._with_grads(group)
                    grads += zip(params, own, strict=True)
                    adapted = adapted_gradients(params, own, group)
                    for p, gradient in zip(params, adapted, strict=True):
                        p.grad = gradient
                    group["weight_decay"] = 0.0
            yield
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                if "weight_decay" in group:
                    group["weight_decay"] = decay
            for p, grad in grads:
                p.grad = grad


def adapted_gradients(params: Tensors, grads: Tensors, group: dict[str, Any]) -> Tensors:
    """Return the gradients of parameters with weight decay and trust ratio, as new tensors."""
    decay = group.get("weight_decay", 0.0)
    adapted = list(params)
    for which in by_kind(params).values():
        p, g = pick(params, which), pick(grads, which)
        ratios = wrapper_ratios(p, g, group)
        # An optimizer that maximizes changes the sign of the whole gradient, decay included.
        signed_decay = -decay if group.get("maximize") else decay
        d = list(torch._foreach_add(g, p, alpha=signed_decay))
        for i, gradient in zip(which, scaled(d, ratios), strict=True):
            adapted[i] = gradient
    return adapted


def wrapper_ratios(weights: Tensors, grads: Tensors, group: dict[str, Any]) -> Tensor:
    """The trust ratios of tensors that share a device and dtype, as a vector."""
    return trust_ratios(
        norms(weights),
        norms(grads),
        coefficient=group["trust_coef"],
        penalty=group.get("weight_decay", 0.0),
        eps=group["lars_eps"],
    )


def _rebuilt(param_groups: Any) -> Optimizer:
    """Rebuild the wrapped optimizer from the groups of a wrapper."""
    first = param_groups[0] if isinstance(param_groups, list) and param_groups else {}
    if not isinstance(first, dict) or "base" not in first:
        raise TypeError(
            "LARSWrapper wraps an optimizer, e.g. LARSWrapper(torch.optim.SGD(params, lr=0.1))"
        )
    base = class_named(first["base"])(param_groups, lr=first["lr"])
    base.defaults.update({name: first[name] for name in base.defaults if name in first})
    return cast(Optimizer, base)
