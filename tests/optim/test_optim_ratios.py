"""`last_ratios` returns what multiplied the update of each tensor, on every path."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lars import LAMB, LARS, TVLARS, LARSWrapper
from lars.names import LAMB_FORMS, LARS_FORMS

PATHS = ("loop", "fused", "foreach")
LR, DECAY = 0.1, 0.01


def tensors(dtype: torch.dtype) -> tuple[list[nn.Parameter], nn.Parameter]:
    """Adapted parameters with gradients, of which one has zero weights, and an excluded one."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(n, 5, dtype=dtype) * scale) for n, scale in SIZES]
    for i, p in enumerate(params):
        p.grad = torch.randn_like(p) * 10.0 ** (i - 2)
    params[-2].grad = torch.zeros_like(params[-2])
    return params[:-1], params[-1]


SIZES = ((3, 1.0), (7, 100.0), (4, 0.0), (9, 0.01), (6, 2.0), (5, 1.0))


def groups(dtype: torch.dtype) -> list[dict]:
    adapted, excluded = tensors(dtype)
    excluded_group = {"params": [excluded], "weight_decay": 0.0, "adapt": False}
    return [{"params": adapted, "weight_decay": DECAY}, excluded_group]


def steps_and_ratios(optimizer, steps: int = 2) -> list[tuple[dict, Tensor, Tensor, list[Tensor]]]:
    """(group, what `last_ratios` returns, ‖Δw‖, weights before) of each group after the last step."""
    for _ in range(steps):
        before = [[p.detach().clone() for p in g["params"]] for g in optimizer.param_groups]
        optimizer.step()
    found = []
    for group, old in zip(optimizer.param_groups, before, strict=True):
        params = group["params"]
        moved = [(p.detach() - w).norm() for p, w in zip(params, old, strict=True)]
        ratios = optimizer.last_ratios(group, params, old)
        found.append((group, ratios, torch.stack(moved), old))
    return found


def decayed(group: dict, old: list[Tensor], form: str = "") -> Tensor:
    """The norm of g + weight_decay * w of each tensor, clamped as in the form ``nus``."""
    norms = []
    for p, w in zip(group["params"], old, strict=True):
        d = p.grad + group["weight_decay"] * w
        if form == "larc" and not (w.norm() > 0 and p.grad.norm() > 0):
            d = p.grad
        norms.append((d.clamp(-10, 10) if form == "nus" else d).norm())
    return torch.stack(norms)


def check(ratios: Tensor, moved: Tensor, direction: Tensor, rtol: float) -> None:
    """‖Δw‖ = lr * ratio * direction, and the ratio is 1 where there is no direction."""
    torch.testing.assert_close(
        LR * ratios.double() * direction.double(), moved.double(), rtol=rtol, atol=1e-12
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", LARS_FORMS)
def test_lars_moves_each_tensor_by_lr_times_ratio(form, path):
    optimizer = LARS(groups(torch.float64), LR, momentum=0, form=form, path=path)
    (adapted, ratios, moved, old), (excluded, ones, moved_too, old_too) = steps_and_ratios(
        optimizer
    )
    check(ratios, moved, decayed(adapted, old, form), 1e-9)
    assert len(set(ratios.tolist())) > 2, "the ratios differ"
    assert ones.tolist() == [1.0]
    check(ones, moved_too, decayed(excluded, old_too, form), 1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [TVLARS, "wrapped", "wrapped twice"])
def test_tvlars_and_the_wrapper_move_each_tensor_by_lr_times_ratio(kind, path):
    own = groups(torch.float64)
    if kind is TVLARS:
        optimizer = TVLARS(own, LR, momentum=0, path=path, lmbda=0.5)
    else:
        dampening = 0.0 if kind == "wrapped" else 0.5  # SGD with dampening is called as it is
        optimizer = LARSWrapper(torch.optim.SGD(own, LR, momentum=0, dampening=dampening))
    for group, ratios, moved, old in steps_and_ratios(optimizer):
        check(ratios, moved, decayed(group, old), 1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", LAMB_FORMS)
def test_lamb_moves_each_tensor_by_lr_times_ratio(form, path):
    optimizer = LAMB(groups(torch.float64), LR, form=form, path=path)
    gradients = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
    total = torch.stack([g.norm() for g in gradients]).norm()
    for group, ratios, moved, old in steps_and_ratios(optimizer, steps=1):
        clip = min(1.0, 1 / (total + 1e-6)) if group["max_grad_norm"] else 1.0
        directions = []
        for p, w in zip(group["params"], old, strict=True):
            m, v = 0.1 * clip * p.grad, 0.001 * (clip * p.grad) ** 2
            if group["bias_correction"]:
                m, v = m / 0.1, v / 0.001
            directions.append((m / (v.sqrt() + 1e-6) + group["weight_decay"] * w).norm())
        check(ratios, moved, torch.stack(directions), 1e-9)


@pytest.mark.parametrize("kind", [LARS, LAMB, TVLARS])
def test_asking_for_the_ratios_changes_nothing(kind):
    watched, alone = (kind(groups(torch.float32), LR, weight_decay=DECAY) for _ in range(2))
    for _ in range(3):
        alone.step()
        steps_and_ratios(watched, steps=1)
    for one, two in zip(watched.param_groups, alone.param_groups, strict=True):
        for p, q in zip(one["params"], two["params"], strict=True):
            assert torch.equal(p, q)
            assert torch.equal(p.grad, q.grad)
    kept = [copy.deepcopy(o.state_dict()["param_groups"]) for o in (watched, alone)]
    assert kept[0] == kept[1]


def test_maximizing_and_a_joint_norm_give_the_ratio_of_the_step():
    options = {"form": "optax", "maximize": True, "momentum": 0}
    optimizer = LARS(groups(torch.float64), LR, **options)
    ((adapted, ratios, moved, old), _) = steps_and_ratios(optimizer)
    pairs = zip(adapted["params"], old, strict=True)
    direction = torch.stack([(DECAY * w - p.grad).norm() for p, w in pairs])
    check(ratios, moved, direction, 1e-9)
