"""The options of the optimizers: forms, explicit values, refused values."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import (
    GRADS,
    START,
    every_path,
    run,
)
from torch import nn
from torch.optim import SGD, Optimizer

from lars import LAMB, LARS, TVLARS, LARSWrapper
from lars.names import LAMB_FORMS, LARS_FORMS


def test_the_forms_of_lars() -> None:
    """The values of every form, as in the documentation."""
    names = ("inside", "denominator", "trust_coefficient", "eps", "max_ratio", "max_element",
             "trust_clip", "zero_norm")  # fmt: skip
    expected = {
        "nus": ("none", "split", 1e-3, 0.0, 50.0, 10.0, False, "one"),
        "mlperf": ("both", "split", 1e-3, 0.0, None, None, False, "one"),
        "optax": ("both", "joint", 1e-3, 0.0, None, None, False, "one"),
        "torchlars": ("ratio", "split", 1e-3, 1e-8, None, None, False, "one"),
        "barlowtwins": ("ratio", "joint", 1e-3, 0.0, None, None, False, "one"),
        "larc": ("ratio", "split", 0.02, 1e-8, None, None, True, "raw"),
        "cmpark": ("none", "momentum", 1.0, 0.0, None, None, False, "formula"),
        "cmpark-inside": ("both", "momentum", 1.0, 0.0, None, None, False, "formula"),
    }
    assert expected.keys() == LARS_FORMS.keys()
    for form, values in expected.items():
        [group] = LARS([nn.Parameter(torch.zeros(2))], form=form).param_groups
        assert tuple(group[name] for name in names) == values, form


def test_the_forms_of_lamb() -> None:
    names = ("bias_correction", "max_grad_norm", "max_weight_norm", "always_adapt", "max_ratio")
    expected = {
        "nus": (False, 1.0, None, False, None),
        "paper": (True, None, None, True, None),
        "tvlars": (False, None, 10.0, True, None),
        "apex": (True, 1.0, None, False, None),
        "lambc": (True, None, None, True, 1.0),
    }
    assert expected.keys() == LAMB_FORMS.keys()
    for form, values in expected.items():
        [group] = LAMB([nn.Parameter(torch.zeros(2))], form=form).param_groups
        assert tuple(group[name] for name in names) == values, form


def test_explicit_options_override_the_form_and_none_removes_a_bound() -> None:
    params = [nn.Parameter(torch.zeros(2))]
    [group] = LARS(params, form="nus", max_ratio=None, max_element=3.0, eps=0.1).param_groups
    assert (group["max_ratio"], group["max_element"], group["eps"]) == (None, 3.0, 0.1)
    [group] = LAMB(params, form="nus", max_grad_norm=None, bias_correction=True).param_groups
    assert (group["max_grad_norm"], group["bias_correction"]) == (None, True)


def test_a_group_may_name_its_own_form() -> None:
    first, second = (nn.Parameter(START[0].clone()) for _ in range(2))
    groups = [{"params": [first]}, {"params": [second], "form": "larc", "eps": 0.5}]
    optimizer = LARS(groups, lr=0.1)
    assert optimizer.param_groups[0]["max_ratio"] == 50.0
    assert optimizer.param_groups[1].items() >= {"max_ratio": None, "trust_clip": True}.items()
    assert optimizer.param_groups[1]["eps"] == 0.5


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (LARS, {"form": "lard"}, "form='lard' is not known; choose one of: nus, mlperf"),
        (LARS, {"lr": -1.0}, "lr=-1.0 must be finite and 0 or more"),
        (LARS, {"lr": math.inf}, "lr=inf must be finite and 0 or more"),
        (LARS, {"lr": math.nan}, "lr=nan must be finite and 0 or more"),
        (LARS, {"momentum": -0.1}, "momentum=-0.1 must be finite and 0 or more"),
        (LARS, {"weight_decay": -0.1}, "weight_decay=-0.1 must be finite and 0 or more"),
        (LARS, {"trust_coefficient": -1}, "trust_coefficient=-1 must be finite and 0 or more"),
        (LARS, {"eps": -1e-8}, "eps=-1e-08 must be finite and 0 or more"),
        (LARS, {"max_ratio": 0.0}, "max_ratio=0.0 must be more than 0, or None for no bound"),
        (LARS, {"max_element": -3}, "max_element=-3 must be more than 0, or None for no bound"),
        (LARS, {"inside": "lr"}, "inside='lr' is not known; choose one of: none, ratio, both"),
        (LARS, {"nonfinite": "ignore"}, "nonfinite='ignore' is not known"),
        (LARS, {"nesterov": True}, "nesterov=True needs a momentum above 0"),
        (LAMB, {"form": "bert"}, "form='bert' is not known; choose one of: nus, paper"),
        (LAMB, {"betas": (0.9, 1.0)}, "betas=(0.9, 1.0) must be two numbers in [0, 1)"),
        (LAMB, {"max_grad_norm": -1.0}, "max_grad_norm=-1.0 must be more than 0"),
        (TVLARS, {"lmbda": -1.0}, "lmbda=-1.0 must be finite and 0 or more"),
        (TVLARS, {"lmbda": math.inf}, "lmbda=inf must be finite and 0 or more"),
        (TVLARS, {"floor": -0.1}, "floor=-0.1 must be finite and 0 or more"),
        (TVLARS, {"max_norm": 0.0}, "max_norm=0.0 must be more than 0, or None for no bound"),
        (TVLARS, {"alpha": 0.0}, "alpha=0.0 must be finite and more than 0"),
        (TVLARS, {"alpha": math.inf}, "alpha=inf must be finite and more than 0"),
        (TVLARS, {"delay": math.nan}, "delay=nan must be a finite number of steps"),
        (TVLARS, {"path": "gpu"}, "path='gpu' is not known"),
    ],
)
def test_bad_values_are_refused_by_name(
    build: Callable[..., Optimizer], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build([nn.Parameter(torch.zeros(2))], **options)


TWO = torch.tensor([0.1, 0.2])


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (LARS, {"lr": "0.1"}, "lr='0.1' must be a number"),
        (LARS, {"lr": None}, "lr=None must be a number"),
        (LARS, {"lr": TWO}, "lr must be a number or a 0-dim tensor, not of shape (2,)"),
        (LARS, {"lr": TWO[:1]}, "lr must be a number or a 0-dim tensor, not of shape (1,)"),
        (LARS, {"max_ratio": "50"}, "max_ratio='50' must be a number"),
        (LAMB, {"weight_decay": None}, "weight_decay=None must be a number"),
        (LAMB, {"betas": 0.9}, "betas=0.9 must be two numbers in [0, 1)"),
        (LAMB, {"betas": ("a", "b")}, "betas='a' must be a number"),
        (TVLARS, {"alpha": None}, "alpha=None must be a number"),
        (TVLARS, {"delay": None}, "delay=None must be a number"),
        (lambda p, **wrong: LARSWrapper(SGD(p), **wrong), {"eps": "x"}, "eps='x' must be a number"),
    ],
)
def test_a_value_that_is_not_a_number_is_refused_by_name(
    build: Callable[..., Optimizer], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        build([nn.Parameter(torch.zeros(2))], **options)


# ------------------------------------------------------------------------------------ always_adapt


@every_path
@pytest.mark.parametrize("form", LARS_FORMS)
def test_always_adapt_false_leaves_out_groups_without_weight_decay(form: str, path: str) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "form": form, "path": path}

    def groups(params: list[Any], **second: Any) -> list[dict[str, Any]]:
        return [
            {"params": params[:1], "weight_decay": 0.1},
            {"params": params[1:], "weight_decay": 0.0} | second,
        ]

    got = run(lambda p: LARS(groups(p), always_adapt=False, **options), START, GRADS)
    want = run(lambda p: LARS(groups(p, adapt=False), **options), START, GRADS)
    assert all(map(torch.equal, got, want))
    everywhere = run(lambda p: LARS(groups(p), **options), START, GRADS)
    assert torch.equal(everywhere[0], got[0])
    assert not torch.allclose(everywhere[1], got[1])


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("always_adapt", [False, True])
def test_timms_lars_is_torchlars_with_its_value_of_always_adapt(
    decay: float, always_adapt: bool
) -> None:
    """Its update, restated: a group without weight decay is plain SGD unless always_adapt is set."""
    lr, momentum = 0.1, 0.9
    want = [x.clone() for x in START[:2]]
    buffers = [torch.zeros_like(x) for x in want]
    for step in GRADS:
        for w, g, b in zip(want, step[:2], buffers, strict=True):
            d = g
            if decay != 0 or always_adapt:
                ratio = 1e-3 * w.norm() / (g.norm() + decay * w.norm() + 1e-8)
                d = ratio * (g + decay * w)
            b.mul_(momentum).add_(d)
            w.sub_(lr * b)
    options = {"form": "torchlars", "weight_decay": decay, "always_adapt": always_adapt}
    got = run(lambda p: LARS(p, lr, momentum, **options), START[:2], [g[:2] for g in GRADS])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
