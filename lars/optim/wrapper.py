"""LARS around any torch optimizer."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer

from lars.optim.groups import check_not_negative, keep_options, with_grads
from lars.optim.lars import momentum_buffers
from lars.optim.trust import trust_ratios
from lars.optim.update import Rule, by_kind, norms, pick, scaled, update


class LARSWrapper(Optimizer):
    r"""Any torch optimizer, fed with gradients that carry weight decay and trust ratio.

    For each tensor w with gradient g the optimizer inside sees, with weight decay 0,

        trust_coef * ‖w‖ / (‖g‖ + weight_decay * ‖w‖ + eps) * (g + weight_decay * w)

    where the factor is 1 if ‖w‖ or ‖g‖ is 0. Around SGD this is the form ``torchlars`` of `LARS`.
    The rule is that of kakaobrain/torchlars.

    It is an Optimizer: schedulers, hooks, ``state_dict``, ``add_param_group``, closures, pickle, deepcopy, GradScaler
    and Horovod's wrapper work on it; give them the wrapper, not the optimizer inside, with which it shares groups and
    state. Deliberate differences from torchlars: ``p.grad`` is left as it is,
    gradients that a closure computes are adapted too, a group with ``adapt=False`` is passed on
    untouched, and around `hvd.DistributedOptimizer` the averaged gradients are awaited first. A
    gradient whose norm is not finite makes the tensor's whole update nan.

    Example:
        base_optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = LARSWrapper(optimizer=base_optimizer, eps=1e-8, trust_coef=0.001)

    Args:
        optimizer: The optimizer inside. Parameter groups that were those of a LARSWrapper do too: the optimizer inside
            is then built anew from them, with their eps and trust_coef, which is what Horovod's wrapper does.
        eps: Added to the denominator.
        trust_coef: The trust coefficient.

    Raises:
        ValueError: eps or trust_coef is negative.
        TypeError: The optimizer evaluates its closure several times per step (LBFGS).
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
        own = {"lars_eps": eps, "trust_coef": trust_coef, "base": _name(type(base))}
        if base is optimizer:
            for group in base.param_groups:
                if "base" in group:  # wrapped before
                    group.update(own)
        else:
            own = {name: base.param_groups[0][name] for name in own}
        base.defaults.update(own)
        super().__init__(base.param_groups, base.defaults)
        self._share(base)

    def _share(self, base: Optimizer) -> None:
        """Hold the groups, state and defaults of the optimizer inside, not copies of them."""
        self.base = base
        self.defaults, self.state, self.param_groups = base.defaults, base.state, base.param_groups

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base" in state:
            self._share(state["base"])
            super().__setstate__(state)
        else:  # loading: groups and state alone, which the optimizer inside may have to mend
            self.base.__setstate__(state)
            self._share(self.base)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of an equal wrapper gave, or of the optimizer inside alone."""
        before = self.param_groups
        super().load_state_dict(state_dict)
        keep_options(self.param_groups, before)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer inside."""
        if "base" in self.__dict__:
            self.base.add_param_group(param_group)
        else:  # Optimizer's constructor, with groups that the optimizer inside has already
            super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of the optimizer inside, on adapted gradients.

        Args:
            closure: Evaluates the model and returns the loss; gradients are enabled meanwhile.

        Returns:
            What ``closure`` returned, or None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if type(self.base) is SGD and not any(group["dampening"] for group in self.param_groups):
            for group in self.param_groups:
                self._step_as_lars(group)
        elif hasattr(self.base, "skip_synchronize"):  # hvd.DistributedOptimizer
            distributed = cast(Any, self.base)
            distributed.synchronize()
            with distributed.skip_synchronize(), self._adapted_gradients():
                distributed.step()
        else:
            with self._adapted_gradients():
                self.base.step()
        return loss

    def _step_as_lars(self, group: dict[str, Any]) -> None:
        """SGD's step with the ratio inside the momentum buffer, without intermediate gradients."""
        params = with_grads(group, "LARSWrapper")
        rule = Rule(
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            trust_coefficient=group["trust_coef"],
            eps=group["lars_eps"],
            inside="ratio",
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            adapt=group.get("adapt", True),
        )
        buffers = momentum_buffers(self.state, params) if rule.momentum else []
        update(params, [cast(Tensor, p.grad) for p in params], buffers, rule)

    @contextlib.contextmanager
    def _adapted_gradients(self) -> Iterator[None]:
        """Adapted gradients in place of p.grad, and weight decay 0, until the context ends."""
        grads: list[tuple[Tensor, Tensor]] = []
        decays = [group.get("weight_decay", 0.0) for group in self.param_groups]
        try:
            for group in self.param_groups:
                if group.get("adapt", True):
                    params = with_grads(group, "LARSWrapper")
                    grads += [(p, cast(Tensor, p.grad)) for p in params]
                    for p, adapted in zip(params, adapted_gradients(params, group), strict=True):
                        p.grad = adapted
                    group["weight_decay"] = 0.0
            yield
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                if "weight_decay" in group:
                    group["weight_decay"] = decay
            for p, grad in grads:
                p.grad = grad


def adapted_gradients(params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """The gradients of these parameters with weight decay and trust ratio, as new tensors."""
    decay = group.get("weight_decay", 0.0)
    adapted = list(params)
    for which in by_kind(params).values():
        p = pick(params, which)
        g = [cast(Tensor, param.grad) for param in p]
        ratios = trust_ratios(
            norms(p),
            norms(g),
            coefficient=group["trust_coef"],
            penalty=decay,
            eps=group["lars_eps"],
        )
        # An optimizer that maximizes changes the sign of what it is given, decay included.
        signed_decay = -decay if group.get("maximize") else decay
        d = list(torch._foreach_add(g, p, alpha=signed_decay))
        for i, gradient in zip(which, scaled(d, ratios), strict=True):
            adapted[i] = gradient
    return adapted


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _rebuilt(param_groups: Any) -> Optimizer:
    """The optimizer inside a wrapper, from the wrapper's groups."""
    first = param_groups[0] if isinstance(param_groups, list) and param_groups else {}
    if not isinstance(first, dict) or "base" not in first:
        raise TypeError(
            "LARSWrapper wraps an optimizer, e.g. LARSWrapper(torch.optim.SGD(params, lr=0.1))"
        )
    module, _, name = first["base"].partition(":")
    base = getattr(importlib.import_module(module), name)(param_groups, lr=first["lr"])
    base.defaults.update({name: first[name] for name in base.defaults if name in first})
    return cast(Optimizer, base)
