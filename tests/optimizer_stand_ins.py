"""Optimizers that tests/lars/test_identify.py identifies: the NUS rule with a mistake, and a LARC wrapper."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class AlteredLars(Optimizer):
    """LARS of NUS with one mistake, by name; without a name it is right."""

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.0,
        eeta: float = 1e-3,
        weight_decay: float = 0.0,
        epsilon: float = 1e-5,
        mistake: str = "",
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "eeta": eeta, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "epsilon": epsilon, "lars": True})
        self.mistake = mistake

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Any, g: Any, group: dict[str, Any]) -> None:
        made, momentum, lr = self.mistake, group["momentum"], group["lr"]
        adapted = group["lars"] or made == "flag ignored"
        decayed = adapted or made == "decay in every group"
        decay = group["weight_decay"] if decayed else 0.0
        if made == "element clamp on the raw gradient":
            d = g.clamp(-10, 10) + decay * p
        else:
            d = g + decay * p
            if made != "no element clamp":
                d = d.clamp(-10, 10)
        ratio = self._ratio(p, g, d, group) if adapted else torch.tensor(1.0, dtype=p.dtype)
        inside = {"ratio inside": ratio, "lr and ratio inside": lr * ratio}.get(made, 1.0)
        outside = {"ratio inside": lr, "lr and ratio inside": 1.0}.get(made, lr * ratio)
        buffer = self.state[p].get("momentum_buffer")
        if buffer is None:
            first = 1 - momentum if made == "dampened first step" else 1.0
            buffer = first * inside * d
        else:
            buffer = momentum * buffer + inside * d
        self.state[p]["momentum_buffer"] = buffer
        update = inside * d + momentum * buffer if made == "nesterov" else buffer
        p.sub_(outside * update)

    def _ratio(self, p: Any, g: Any, d: Any, group: dict[str, Any]) -> Any:
        made = self.mistake
        weight, grad = p.norm(), (d if made == "norm of the decayed gradient" else g).norm()
        eps = 0.0 if made == "no eps" else group["epsilon"]
        ratio = group["eeta"] * weight / (grad + group["weight_decay"] * weight + eps)
        bound = {"no ratio clamp": None, "ratio clamp 10": 10.0}.get(made, 50.0)
        if bound is not None:
            ratio = ratio.clamp(max=bound)
        live = (weight > 0) & ((grad > 0) | (made == "zero gradient adapted"))
        other = 0.0 if made == "ratio 0 for zero norms" else 1.0
        return torch.where(live, ratio, other)


class WrappingLARC:
    """A wrapper in the style of LARC of apex: it changes the gradients, then lets an optimizer take a step."""

    def __init__(
        self,
        optimizer: Optimizer,
        trust_coefficient: float = 0.02,
        clip: bool = True,
        eps: float = 1e-8,
    ) -> None:
        self.optim, self.trust_coefficient, self.clip, self.eps = (
            optimizer,
            trust_coefficient,
            clip,
            eps,
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the wrapped optimizer."""
        return self.optim.param_groups

    def step(self) -> None:
        """Scale the gradients and take a step without weight decay."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            for p in group["params"]:
                if p.grad is None:
                    continue
                weight, grad = p.detach().norm(), p.grad.norm()
                if weight > 0 and grad > 0:
                    ratio = self.trust_coefficient * weight / (grad + decay * weight + self.eps)
                    if self.clip:
                        ratio = (ratio / group["lr"]).clamp(max=1.0)
                    p.grad.add_(p.detach(), alpha=decay).mul_(ratio)
            group["weight_decay"] = 0.0
        self.optim.step()
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay


class NeedsMore(torch.optim.SGD):
    """An optimizer whose constructor has an argument that nobody can guess."""

    def __init__(self, params: Any, lr: float, horizon: int) -> None:
        super().__init__(params, lr=lr)
        self.horizon = horizon


class StepNeedsMore(torch.optim.SGD):
    """An optimizer whose step has an argument that nobody can guess."""

    def step(self, epoch: int) -> None:  # type: ignore[override]
        """Take a step."""
        super().step()


class FailsAtZero(torch.optim.SGD):
    """An optimizer that divides by lr."""

    def step(self) -> None:  # type: ignore[override]
        """Take a step."""
        for group in self.param_groups:
            1.0 / group["lr"]
        super().step()
