"""Replays the goldens: parameters of a toy model that the published implementations computed.

goldens/*.json hold the parameters after 1, 2, 5 and 10 steps on fixed gradients. The model has a layer for every
trap: zero weights, zero gradients, both, no gradient, ratios beyond their bound, elements beyond their bound, and a
layer whose name merely contains "bias".
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from conftest import golden

FLOATS = {"f64": torch.float64, "f32": torch.float32}
PATHS = ("loop", "fused", "foreach")
Params = dict[str, nn.Parameter]


def read(name: str) -> dict[str, Any]:
    return golden(f"{name}.json")


INPUTS = read("inputs")


def tensor(values: list[float], name: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(INPUTS["shapes"][name]).to(dtype)


class ToyModel(nn.Module):
    """A model with the parameters, and their values, of inputs.json."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.ln = nn.LayerNorm(6)
        self.gn = nn.GroupNorm(2, 4)
        self.big = nn.Linear(4, 4, bias=False)
        self.zero_w = nn.Linear(5, 3, bias=False)
        self.zero_g = nn.Linear(5, 3, bias=False)
        self.dead = nn.Linear(2, 2, bias=False)
        self.nograd = nn.Linear(2, 2, bias=False)
        self.rebias = nn.Linear(2, 2, bias=False)
        self.fc = nn.Linear(6, 5)
        self.to(dtype)
        with torch.no_grad():
            for name, param in self.named_parameters():
                param.copy_(tensor(INPUTS["params"][name], name, dtype))


def replay(
    case: dict[str, Any],
    build: Callable[[Params, ToyModel], Optimizer],
    *,
    precision: str = "f64",
    rtol: float | None = None,
    without: tuple[str, ...] = (),
    state_names: dict[str, str] | None = None,
) -> None:
    """Step on the ten gradients and compare the parameters with a case of a golden file.

    ``without``: parameters that differ on purpose. ``state_names``: ours by the golden's.
    """
    dtype = FLOATS[precision]
    model = ToyModel(dtype)
    params = dict(model.named_parameters())
    optimizer = build(params, model)
    tolerance = {"rtol": rtol or 1e-10, "atol": 1e-15}
    if precision == "f32":
        tolerance = {"rtol": rtol or 1e-5, "atol": 1e-7}
    lr_per_step = case["hyper"].get("lr_per_step")
    compared = 0
    for step, grads in enumerate(INPUTS["grads"]):
        for name, param in params.items():
            has_grad = grads[name] is not None and name not in case.get("no_grad_for", ())
            param.grad = tensor(grads[name], name, dtype) if has_grad else None
        if lr_per_step is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr_per_step[step]
        optimizer.step()
        expected = case[precision]["params"].get(str(step + 1), {})
        for name in expected.keys() - set(without):
            want = tensor([float(x) for x in expected[name]], name, dtype)
            torch.testing.assert_close(
                params[name].detach(),
                want,
                **tolerance,
                msg=lambda m, n=name, s=step: f"{n} after step {s + 1}: {m}",
            )
            compared += 1
    assert compared >= (40 if precision == "f64" else 10)
    for name, state in case[precision].get("state", {}).items():
        for theirs, ours in (state_names or {}).items():
            if name not in without and state.get(theirs) is not None:
                want = tensor(state[theirs], name, dtype)
                torch.testing.assert_close(optimizer.state[params[name]][ours], want, **tolerance)


def cases(file: str, *names: str) -> Any:
    """Parametrize a test over the cases of a file, or over the named cases only."""
    content = read(file)["cases"]
    chosen = {name: content[name] for name in names or content}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen.keys())


def groups_of(case: dict[str, Any], params: Params, *, adapted: str | None = None) -> list[dict]:
    """The parameter groups of the golden; ``adapted`` is its name for our ``adapt``."""
    return [
        {
            "params": [params[name] for name in group["params"]],
            "weight_decay": group["weight_decay"],
            "adapt": group[adapted] if adapted else True,
        }
        for group in case["f64"]["groups"]
    ]


def by_ndim(case: dict[str, Any], params: Params) -> list[dict]:
    """Groups for the filters of tvlars: do 1-dim parameters have weight decay and a ratio?"""
    hyper = case["hyper"]
    vectors = [p for p in params.values() if p.ndim == 1]
    matrices = [p for p in params.values() if p.ndim != 1]
    decay = hyper["weight_decay"]
    return [
        {"params": matrices, "weight_decay": decay},
        {
            "params": vectors,
            "weight_decay": 0.0 if hyper["weight_decay_filter"] else decay,
            "adapt": not hyper["lars_adaptation_filter"],
        },
    ]


every_path = pytest.mark.parametrize("path", PATHS)
every_precision = pytest.mark.parametrize("precision", FLOATS)
# Deliberate differences of our groups: GroupNorm is a norm, and a layer called rebias is not a bias.
REGROUPED = ("gn.weight", "rebias.weight")
