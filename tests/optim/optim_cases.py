"""What the tests of the optimizers share: every rule, fixed inputs, and tensors of every layout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lars import LAMB, LARS, TVLARS
from lars.names import LAMB_FORMS, LARS_FORMS

PATHS = ("loop", "fused", "foreach")
Build = Callable[[list[Any]], Optimizer]
RULES: dict[str, Build] = {
    **{
        f"lars-{form}": lambda params, form=form, **options: LARS(
            params, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "form": form} | options
        )
        for form in LARS_FORMS
    },
    **{
        f"lamb-{form}": lambda params, form=form, **options: LAMB(
            params, **{"lr": 0.1, "weight_decay": 1e-2, "form": form} | options
        )
        for form in LAMB_FORMS
    },
    "tvlars": lambda params, **options: TVLARS(params, **{"lr": 0.1} | options),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
every_path = pytest.mark.parametrize("path", PATHS)


def seeded(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def run(build: Build, start: list[Tensor], grads: list[list[Tensor | None]]) -> list[Tensor]:
    """Return the parameters after steps with these gradients."""
    params = [nn.Parameter(x.clone(memory_format=torch.preserve_format)) for x in start]
    optimizer = build(params)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else g.clone(memory_format=torch.preserve_format)
        optimizer.step()
    return [p.detach() for p in params]


SHAPES = ((6, 5), (4, 3, 2, 2), (7,), (), (0, 3))
START = seeded(1, *SHAPES)
GRADS: list[list[Tensor | None]] = [list(seeded(2 + k, *SHAPES)) for k in range(5)]

KINDS = ("ordinary", "zero weight", "zero grad", "dead", "no grad", "large", "inf", "nan", "tiny")
LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "mixed", "expanded grad")


def make(kind: str, layout: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, list[Any]]:
    """Make a parameter and three gradients for it."""
    shape = (4, 3, 2, 2)
    weight, *grads = seeded(seed, *[shape] * 4)
    if kind in ("zero weight", "dead"):
        weight = torch.zeros_like(weight)
    tiny = 1e-4 if dtype == torch.float16 else 1e-7  # ratio * decay must fit into float16
    scale = {"zero grad": 0.0, "dead": 0.0, "large": 100.0, "tiny": tiny}.get(kind, 1.0)
    grads = [g * scale for g in grads]
    if kind in ("inf", "nan"):
        grads[1][0, 0, 0, 0] = float(kind)
    weight = weight.to(dtype)
    typed: list[Any] = [g.to(dtype) for g in grads]
    if layout in ("channels_last", "mixed"):
        weight = weight.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last":
        typed = [g.contiguous(memory_format=torch.channels_last) for g in typed]
    if layout == "transposed":
        weight = weight.transpose(0, 3).contiguous().transpose(0, 3)
        typed = [g.transpose(0, 3).contiguous().transpose(0, 3) for g in typed]
    if layout == "strided":
        weight = torch.stack([weight, weight], dim=-1)[..., 0]
    if layout == "expanded grad":
        typed = [g[:1].expand(shape) for g in typed]
    if kind == "no grad":
        typed = [None] * 3
    return weight, typed


def step_through(optimizer: Optimizer, params: list[nn.Parameter], grads: list[list[Any]]) -> None:
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g
        optimizer.step()
