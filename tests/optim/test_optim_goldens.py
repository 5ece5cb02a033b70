"""The optimizers against numbers that the published implementations themselves gave.

goldens/*.json hold the parameters of a toy model after 1, 2, 5 and 10 steps on fixed gradients. It
has a layer for every trap: zero weights, zero gradients, both, no gradient, ratios beyond the
clamp, elements beyond the clamp, and a layer that is only called a bias.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from conftest import golden
from lars import (
    LAMB,
    LARS,
    TVLARS,
    LARSWrapper,
    create_lamb_optimizer,
    create_optimizer_lars,
)
from lars.optim.tvlars import time_factor

FLOATS = {"f64": torch.float64, "f32": torch.float32}
PATHS = ("loop", "fused", "foreach")
Params = dict[str, nn.Parameter]


def read(name: str) -> dict[str, Any]:
    return golden(f"{name}.json")


INPUTS = read("inputs")


def tensor(values: list[float], name: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(INPUTS["shapes"][name]).to(dtype)


class ToyModel(nn.Module):
    """The model whose parameters inputs.json names, with the values it gives."""

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
    """Feed the ten gradients to an optimizer and compare with a case of a golden file.

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
    """Parametrization over the cases of a file, or over those named."""
    content = read(file)["cases"]
    chosen = {name: content[name] for name in names or content}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen.keys())


def groups_of(case: dict[str, Any], params: Params, *, adapted: str | None = None) -> list[dict]:
    """The golden's own groups; ``adapted`` is its name for our ``adapt``."""
    return [
        {
            "params": [params[name] for name in group["params"]],
            "weight_decay": group["weight_decay"],
            "adapt": group[adapted] if adapted else True,
        }
        for group in case["f64"]["groups"]
    ]


def by_ndim(case: dict[str, Any], params: Params) -> list[dict]:
    """Groups for tvlars' filters: whether 1-dim parameters have decay, and a ratio."""
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
# Deliberate differences of our groups: GroupNorm is a norm, and a layer called rebias is no bias.
REGROUPED = ("gn.weight", "rebias.weight")


@cases("nus_lars")
@every_path
@every_precision
def test_nus_lars(case: dict[str, Any], path: str, precision: str) -> None:
    first = case["f64"]["groups"][0]
    replay(
        case,
        lambda params, _: LARS(
            groups_of(case, params, adapted="lars"),
            lr=first["lr"],
            momentum=first["momentum"],
            trust_coefficient=first["eeta"],
            eps=first["epsilon"],
            path=path,
        ),
        precision=precision,
        state_names={"momentum_buffer": "momentum_buffer"},
    )


@cases("nus_lars", "sep", "all", "sep_eps0", "sep_mom0", "sep_wd0")
def test_nus_lars_by_its_function(case: dict[str, Any]) -> None:
    replay(case, lambda _, model: create_optimizer_lars(model, **case["hyper"]), without=REGROUPED)


@cases("nus_lars", "class_default_args")
def test_nus_lars_class_defaults(case: dict[str, Any]) -> None:
    replay(case, lambda _, model: LARS(model.parameters()))


@cases("nus_lars", "sep")
@every_path
def test_nus_lars_with_a_tensor_lr(case: dict[str, Any], path: str) -> None:
    def build(params: Params, _: ToyModel) -> Optimizer:
        groups = groups_of(case, params, adapted="lars")
        lr = torch.tensor(0.5, dtype=torch.float64)
        return LARS(groups, lr=lr, momentum=0.9, eps=1e-5, path=path)

    replay(case, build)


@cases("nus_lamb")
@every_path
@every_precision
def test_nus_lamb(case: dict[str, Any], path: str, precision: str) -> None:
    replay(
        case,
        lambda params, _: LAMB(groups_of(case, params), lr=case["hyper"]["lr"], path=path),
        precision=precision,
        rtol=5e-5 if precision == "f32" else None,
        state_names={"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    )


@cases("nus_lamb")
def test_nus_lamb_by_its_function(case: dict[str, Any]) -> None:
    hyper = case["hyper"]
    regrouped = ("gn.weight", "gn.bias", "rebias.weight")
    replay(case, lambda _, model: create_lamb_optimizer(model, **hyper), without=regrouped)


@cases("paper_lars")
@every_path
def test_paper_lars(case: dict[str, Any], path: str) -> None:
    hyper = case["hyper"]
    replay(
        case,
        lambda _, model: LARS(
            model.parameters(),
            momentum=hyper["momentum"],
            weight_decay=hyper["weight_decay"],
            trust_coefficient=hyper["eta"],
            form="mlperf",
            path=path,
        ),
    )


@cases("torchlars")
@every_precision
def test_torchlars(case: dict[str, Any], precision: str) -> None:
    hyper = case["hyper"]

    def build(_: Params, model: ToyModel) -> Optimizer:
        base = SGD(
            model.parameters(),
            lr=hyper["lr"],
            momentum=hyper["momentum"],
            weight_decay=hyper["weight_decay"],
            nesterov="nesterov" in hyper["base"],
        )
        return LARSWrapper(base, eps=hyper["eps"], trust_coef=hyper["trust_coef"])

    names = {"momentum_buffer": "momentum_buffer"}
    replay(case, build, precision=precision, state_names=names)


@cases("torchlars")
@every_path
def test_torchlars_as_a_form(case: dict[str, Any], path: str) -> None:
    hyper = case["hyper"]
    replay(
        case,
        lambda _, model: LARS(
            model.parameters(),
            lr=hyper["lr"],
            momentum=hyper["momentum"],
            weight_decay=hyper["weight_decay"],
            trust_coefficient=hyper["trust_coef"],
            eps=hyper["eps"],
            nesterov="nesterov" in hyper["base"],
            form="torchlars",
            path=path,
        ),
    )


@cases("tvlars_optim", "LARS_filtered", "LARS_unfiltered", "LARS_two_groups")
@every_path
@every_precision
def test_barlow_twins_lars(case: dict[str, Any], path: str, precision: str) -> None:
    replay(
        case,
        lambda params, _: LARS(
            by_ndim(case, params),
            lr=case["hyper"]["lr"],
            momentum=0.9,
            form="barlowtwins",
            path=path,
        ),
        precision=precision,
        state_names={"mu": "momentum_buffer"},
    )


@cases("tvlars_optim", "TVLARS_lmbda1e-3", "TVLARS_lmbda1e-6", "TVLARS_unfiltered")
@every_path
@every_precision
def test_tvlars(case: dict[str, Any], path: str, precision: str) -> None:
    hyper = case["hyper"]
    replay(
        case,
        lambda params, _: TVLARS(
            by_ndim(case, params), lr=hyper["lr"], lmbda=hyper["lmbda"], path=path
        ),
        precision=precision,
        rtol=1e-6 if precision == "f64" else 1e-5,  # the code computes its factor in float32
    )


@cases("tvlars_optim", "LAMB", "LAMB_adam")
@every_path
@every_precision
def test_tvlars_lamb(case: dict[str, Any], path: str, precision: str) -> None:
    hyper = case["hyper"]
    replay(
        case,
        lambda _, model: LAMB(
            model.parameters(),
            lr=hyper["lr"],
            weight_decay=hyper["weight_decay"],
            form="tvlars",
            adapt=not hyper["adam"],
            path=path,
        ),
        precision=precision,
        rtol=5e-5 if precision == "f32" else None,
        state_names={"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    )


CMPARK = {
    "published_SGD_with_lars_ver2": {"form": "cmpark"},
    "SGD_with_lars": {"form": "cmpark-inside"},
    # With no momentum there is no buffer that its last state could spoil: only the denominator
    # differs from the published one.
    "SGD_with_lars_ver2_mom0": {"form": "cmpark", "denominator": "split"},
}


@pytest.mark.parametrize("name", CMPARK)
@every_path
@every_precision
def test_cmpark(name: str, path: str, precision: str) -> None:
    case = read("cmpark_optim")["cases"][name]
    hyper = case["hyper"]
    replay(
        case,
        lambda _, model: LARS(
            model.parameters(),
            lr=hyper["lr"],
            momentum=hyper["momentum"],
            weight_decay=hyper["weight_decay"],
            trust_coefficient=hyper["trust_coef"],
            path=path,
            **CMPARK[name],
        ),
        precision=precision,
    )


def test_cmparks_last_state_is_a_defect_and_not_among_the_forms() -> None:
    """It scales the momentum buffer itself, so its numbers are those of no form."""
    case = read("cmpark_optim")["cases"]["SGD_with_lars_ver2"]
    for form in ("cmpark", "cmpark-inside"):
        with pytest.raises(AssertionError):
            replay(
                case,
                lambda _, model, form=form: LARS(
                    model.parameters(),
                    lr=0.05,
                    momentum=0.9,
                    weight_decay=0.005,
                    trust_coefficient=0.1,
                    form=form,
                ),
            )


def test_cmparks_zero_by_zero_is_zero_and_not_nan() -> None:
    assert read("cmpark_optim")["zero_weight_zero_grad_after_one_step"] == ["nan"] * 3
    for path in PATHS:
        weight = nn.Parameter(torch.zeros(3))
        weight.grad = torch.zeros(3)
        LARS([weight], momentum=0.9, form="cmpark", path=path).step()
        assert weight.tolist() == [0.0, 0.0, 0.0]


def test_tvlars_time_factor() -> None:
    for lmbda, factors in read("schedules")["tvlars_time_factor"]["at"].items():
        for steps_done, factor in factors.items():
            step = torch.tensor(float(steps_done) + 1, dtype=torch.float64)
            got = time_factor(step, lmbda=float(lmbda)).item()
            # float32 rounds the exponent x = lmbda * step, and so the factor by x * 6e-8, and has
            # no numbers below 1e-45.
            assert math.isclose(
                got, factor, rel_tol=1e-6 + 6e-8 * float(lmbda) * step, abs_tol=1e-42
            )
