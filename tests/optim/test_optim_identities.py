"""Identities: with some options the optimizers equal torch's optimizers, or each other."""

import math
from typing import Any

import pytest
import torch
from optim_cases import (
    GRADS,
    PATHS,
    START,
    Build,
    every_path,
    every_rule,
    run,
)
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lars import LAMB, LARS, TVLARS, LARSWrapper
from lars.names import LARS_FORMS
from lars.optim.tvlars import time_factor


@every_path
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "maximize": True},
        {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "maximize": True},
    ],
)
@pytest.mark.parametrize("form", LARS_FORMS)
def test_lars_without_a_ratio_is_sgd(form: str, options: dict[str, Any], path: str) -> None:
    sgd = run(lambda params: SGD(params, lr=0.3, **options), START, GRADS)
    lars = run(
        lambda params: LARS(params, lr=0.3, form=form, adapt=False, path=path, **options),
        START,
        GRADS,
    )
    torch.testing.assert_close(lars, sgd, rtol=1e-12, atol=1e-12)


@every_path
@pytest.mark.parametrize("reference", [Adam, AdamW])
def test_lamb_without_a_ratio_is_adam(reference: type[Optimizer], path: str) -> None:
    options: dict[str, Any] = {"lr": 0.3, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}
    adam = run(lambda params: reference(params, **options), START, GRADS)
    lamb = run(
        lambda params: LAMB(
            params,
            form="paper",
            adapt=False,
            decoupled_weight_decay=reference is AdamW,
            path=path,
            **options,
        ),
        START,
        GRADS,
    )
    torch.testing.assert_close(lamb, adam, rtol=1e-12, atol=1e-12)


def test_lamb_corrects_its_bias_in_float32_as_exactly_as_in_float64() -> None:
    """In float32, 1 - 0.999 ** 1 has a relative error of 5e-5."""
    start, grad = START[0], GRADS[0][0]
    options = {"form": "paper", "adapt": False, "lr": 0.1}
    [exact] = run(lambda params: LAMB(params, **options), [start], [[grad]])
    for path in PATHS:
        [rounded] = run(
            lambda params, path=path: LAMB(params, path=path, **options),
            [torch.zeros(6, 5)],
            [[grad.float()]],
        )
        torch.testing.assert_close(rounded.double(), exact - start, rtol=5e-6, atol=0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_wrapper_around_sgd_is_the_form_torchlars(nesterov: bool) -> None:
    sgd = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov}
    form = run(lambda params: LARS(params, form="torchlars", **sgd), START, GRADS)
    wrapped = run(lambda params: LARSWrapper(SGD(params, **sgd)), START, GRADS)
    torch.testing.assert_close(wrapped, form, rtol=1e-12, atol=0)


def test_larc_is_sgd_at_the_smaller_of_the_two_rates() -> None:
    """Without momentum the effective rate of each layer is min(ratio, lr)."""
    weight, grad = START[0], GRADS[0][0]
    ratio = 0.02 * weight.norm() / (grad.norm() + 1e-8)
    for lr in (0.25 * ratio.item(), 4 * ratio.item()):
        [after] = run(lambda params, lr=lr: LARS(params, form="larc", lr=lr), [weight], [[grad]])
        rate = min(ratio.item(), lr)
        torch.testing.assert_close(after, weight - rate * grad, rtol=1e-12, atol=1e-14)


@every_path
def test_larc_may_start_at_lr_zero(path: str) -> None:
    """The published clip divides by lr, and the unscaled gradient enters the buffer."""
    weight, grads = START[0], [[g[0]] for g in GRADS]
    params = [nn.Parameter(weight.clone())]
    optimizer = LARS(params, lr=0.0, momentum=0.9, form="larc", path=path)
    moves = []
    for k, [grad] in enumerate(grads):
        before = params[0].detach().clone()
        params[0].grad = grad.clone()
        optimizer.param_groups[0]["lr"] = [0.0, 2.0, 2.0, 2.0, 2.0][k]
        optimizer.step()
        moves.append((params[0].detach() - before).norm().item() / before.norm().item())
    assert moves[0] == 0.0
    # Each gradient moves the weight by min(ratio, lr) * ‖g‖ / ‖w‖ = 0.02, and momentum makes that at
    # most ten times as much. The unscaled gradient of step 0 would move it by lr * 0.9 = 1.8.
    assert all(0 < move < 0.2 for move in moves[1:])


@pytest.mark.parametrize("delay", [0, 3])
def test_tvlars_is_a_lars_whose_coefficient_follows_the_factor(delay: float) -> None:
    options: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1}
    factor = {"lmbda": 0.5, "alpha": 0.7, "delay": delay, "floor": 0.05}
    params = [nn.Parameter(x.clone()) for x in START]
    lars = LARS(params, form="barlowtwins", **options)
    for k, grads in enumerate(GRADS):
        phi = 1 / (0.7 + math.exp(0.5 * (k + 1 - delay))) + 0.05
        lars.param_groups[0]["trust_coefficient"] = 1e-3 * phi
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        lars.step()
    tvlars = run(lambda params: TVLARS(params, max_norm=None, **options, **factor), START, GRADS)
    torch.testing.assert_close(tvlars, [p.detach() for p in params], rtol=1e-12, atol=1e-14)


def test_the_time_factor_never_overflows_and_ends_at_its_floor() -> None:
    for step in (1e3, 1e5, 1e9, 1e300):
        at_end = time_factor(torch.tensor(step, dtype=torch.float64), lmbda=1.0, floor=0.125)
        assert at_end.item() == 0.125
    early = time_factor(torch.tensor(1.0, dtype=torch.float64), lmbda=1.0, alpha=0.5, delay=1e6)
    assert early.item() == 2.0


@pytest.mark.parametrize("lr", [1, torch.tensor(1.0)])
@every_rule
def test_lr_may_be_an_int_or_a_tensor(rule: Build, lr: Any) -> None:
    plain = run(lambda params: rule(params, lr=1.0), START, GRADS)
    for path in PATHS:
        other = run(lambda params, path=path: rule(params, lr=lr, path=path), START, GRADS)
        torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-12)
