"""The optimizers compared with numbers that the published implementations computed."""

import math
from typing import Any

import pytest
import torch
from optim_goldens import (
    PATHS,
    REGROUPED,
    Params,
    ToyModel,
    by_ndim,
    cases,
    every_path,
    every_precision,
    groups_of,
    read,
    replay,
)
from torch import nn
from torch.optim import SGD, Optimizer

from lars import (
    LAMB,
    LARS,
    TVLARS,
    LARSWrapper,
    create_lamb_optimizer,
    create_optimizer_lars,
)
from lars.optim.tvlars import time_factor


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
        rtol=1e-6
        if precision == "f64"
        else 1e-5,  # the published code computes its factor in float32
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
    # The latest version corrupts the momentum buffer. Without momentum there is no buffer, and only
    # the denominator differs from the published version.
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


def test_the_latest_version_of_cmpark_is_a_defect_and_not_a_form() -> None:
    """It scales the momentum buffer in place, so its numbers match no form."""
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


def test_zero_by_zero_in_cmpark_is_zero_and_not_nan() -> None:
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
            # float32 rounds the exponent x = lmbda * step, which changes the factor by x * 6e-8. It
            # has no numbers below 1e-45.
            assert math.isclose(
                got, factor, rel_tol=1e-6 + 6e-8 * float(lmbda) * step, abs_tol=1e-42
            )
