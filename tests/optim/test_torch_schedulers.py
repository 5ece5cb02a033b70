"""Schedules as torch schedulers: their rates, resuming at any step, and refused options."""

import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from conftest import golden
from lars import SCHEDULES, FunctionLR, GradualWarmup, PolynomialWarmup

GOLDENS = golden("schedules.json")


def close(got: float, want: float) -> bool:
    return math.isclose(got, want, rel_tol=1e-12, abs_tol=1e-15)


def sgd(*lrs: float) -> SGD:
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs])


def rates(scheduler: LRScheduler, steps: int) -> list[list[float]]:
    """The lr of each group in each optimizer step."""
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


POLYNOMIAL_CASES = GOLDENS["nus_polynomial_warmup"]["cases"]


@pytest.mark.parametrize("case", POLYNOMIAL_CASES.values(), ids=POLYNOMIAL_CASES.keys())
def test_polynomial_warmup_equals_that_of_nus(case: dict[str, Any]) -> None:
    scheduler = PolynomialWarmup(sgd(*case["base_lrs"]), **case["args"])
    got = rates(scheduler, len(case["lr"]))
    assert len(got) > 10
    for step, (ours, theirs) in enumerate(zip(got, case["lr"], strict=True)):
        assert all(map(close, ours, theirs)), f"step {step}: {ours} is not {theirs}"


def test_a_resumed_run_continues_where_it_stopped() -> None:
    """The scheduler of NUS restarts its warm-up."""
    golden = GOLDENS["nus_resume_defect"]
    args = {"decay_steps": 40, "warmup_steps": 8, "end_lr": 0.0, "power": 2.0}
    first = PolynomialWarmup(sgd(1.0), **args)
    rates(first, 20)
    saved = io.BytesIO()
    torch.save({"o": first.optimizer.state_dict(), "s": first.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)

    loaded = PolynomialWarmup(sgd(1.0), **args)
    loaded.optimizer.load_state_dict(state["o"])
    loaded.load_state_dict(state["s"])
    resumed = [lr for (lr,) in rates(loaded, 5)]
    assert all(map(close, resumed, golden["uninterrupted_from_20"]))

    built = sgd(1.0)
    built.load_state_dict(state["o"])
    by_number = PolynomialWarmup(built, **args, last_epoch=19)
    assert [lr for (lr,) in rates(by_number, 5)] == resumed


def test_gradual_warmup_then_another_scheduler() -> None:
    golden = GOLDENS["cmpark_gradual_then_step"]
    optimizer = sgd(golden["base_lr"])
    scheduler = GradualWarmup(
        optimizer,
        golden["multiplier"],
        golden["total_epoch"],
        StepLR(optimizer, step_size=2, gamma=0.1),
    )
    got = [lr for (lr,) in rates(scheduler, len(golden["lr"]))]
    assert all(map(close, got, golden["lr"]))
    assert close(scheduler.get_last_lr()[0], optimizer.param_groups[0]["lr"])


def test_gradual_warmup_resumes_at_any_step() -> None:
    def build() -> GradualWarmup:
        optimizer = sgd(0.1)
        return GradualWarmup(optimizer, 3.0, 4, StepLR(optimizer, step_size=2, gamma=0.1))

    straight = rates(build(), 12)
    for stop in range(12):
        first, second = build(), build()
        rates(first, stop)
        saved = io.BytesIO()
        torch.save({"o": first.optimizer.state_dict(), "s": first.state_dict()}, saved)
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
        second.optimizer.load_state_dict(state["o"])
        second.load_state_dict(state["s"])
        assert rates(second, 12 - stop) == straight[stop:]


AFTER: dict[str, Callable[[SGD], LRScheduler]] = {
    "constant": lambda optimizer: ConstantLR(optimizer, factor=0.5, total_iters=3),
    "linear": lambda optimizer: LinearLR(optimizer, start_factor=0.25, total_iters=4),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 0.8 ** (step + 1)),
    "multi-step": lambda optimizer: MultiStepLR(optimizer, [0, 3]),
    "exponential": lambda optimizer: ExponentialLR(optimizer, 0.9),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 7),
    "restarts": lambda optimizer: CosineAnnealingWarmRestarts(optimizer, 3),
    "warm-up": lambda optimizer: PolynomialWarmup(optimizer, 7, warmup_steps=2, end_lr=0.0),
}


@pytest.mark.parametrize("after", AFTER.values(), ids=AFTER.keys())
@pytest.mark.parametrize("total_epoch", [0, 3, 2.5])
def test_the_scheduler_after_a_gradual_warmup_keeps_its_rates(
    after: Callable[[SGD], LRScheduler], total_epoch: float
) -> None:
    both, alone = sgd(0.1, 0.2), sgd(0.3, 0.6)
    got = rates(GradualWarmup(both, 3.0, total_epoch, after(both)), 12)
    want = rates(after(alone), 8)
    start = math.floor(total_epoch) + 1
    assert start + 8 <= 12
    for ours, theirs in zip(got[start : start + 8], want, strict=True):
        assert all(map(close, ours, theirs)), f"{got[start:]} is not {want}"


def test_gradual_warmup_then_plateau_equals_cmpark() -> None:
    optimizer = sgd(1.0)
    plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    scheduler = GradualWarmup(optimizer, 3.0, 2, plateau)
    seen = []
    for _ in range(5):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(metrics=1.0)
        assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]
    assert seen == [2.0, 3.0, 3.0, 1.5, 0.75]


def test_an_invalid_gradual_warmup_is_refused() -> None:
    optimizer = sgd(1.0)
    with pytest.raises(ValueError, match=r"multiplier=0\.5 must be 1 or more"):
        GradualWarmup(optimizer, 0.5, 2)
    with pytest.raises(ValueError, match="total_epoch=-1 must be finite and 0 or more"):
        GradualWarmup(optimizer, 2.0, -1)
    with pytest.raises(ValueError, match="after_scheduler must have the same optimizer"):
        GradualWarmup(optimizer, 2.0, 2, ExponentialLR(sgd(1.0), 0.9))
    step, exponential = StepLR(optimizer, 2), ExponentialLR(optimizer, 0.9)
    for several in (
        SequentialLR(optimizer, [step, exponential], [3]),
        ChainedScheduler([step, exponential]),
        GradualWarmup(optimizer, 2.0, 2),
    ):
        with pytest.raises(TypeError, match="after_scheduler must be a single scheduler, not "):
            GradualWarmup(optimizer, 2.0, 2, several)


OPTIONS = {
    "warmup": {"warmup_steps": 3},
    "constant_warmup": {"warmup_steps": 3},
    "polynomial": {"total_steps": 12, "warmup_steps": 2.5},
    "cosine": {"total_steps": 12, "warmup_steps": 2.5},
    "step_decay": {"milestones": [4, 8], "warmup_steps": 2},
    "epochwise_polynomial": {"steps_per_epoch": 2, "warmup_epochs": 2, "decay_epochs": 4},
    "ramp": {"total_steps": 12, "start_lr": 1e-3},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_a_torch_scheduler_that_resumes_at_any_step(name: str) -> None:
    def build() -> FunctionLR:
        return FunctionLR(sgd(1.0, 0.5), name, **OPTIONS[name])

    straight = rates(build(), 14)
    expected = [
        [SCHEDULES[name](step, peak=peak, **OPTIONS[name]) for peak in (1.0, 0.5)]
        for step in range(14)
    ]
    assert straight == expected
    for stop in (0, 1, 2, 3, 7, 13):
        first, second = build(), build()
        rates(first, stop)
        saved = io.BytesIO()
        torch.save({"o": first.optimizer.state_dict(), "s": first.state_dict()}, saved)
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
        second.optimizer.load_state_dict(state["o"])
        second.load_state_dict(state["s"])
        assert rates(second, 14 - stop) == straight[stop:]
        assert second.get_last_lr() == [g["lr"] for g in second.optimizer.param_groups]


def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="schedule='poly' is not known; choose one of: warmup"):
        FunctionLR(sgd(1.0), "poly")


def test_schedulers_raise_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates(PolynomialWarmup(sgd(1.0), decay_steps=5, warmup_steps=2), 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_steps": 0}, "decay_steps=0 must be finite and more than 0"),
        ({"decay_steps": -5}, "decay_steps=-5 must be finite and more than 0"),
        ({"warmup_steps": math.nan}, "warmup_steps=nan must be finite and 0 or more"),
        ({"power": -1}, "power=-1 must be finite and 0 or more"),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, float], message: str) -> None:
    optimizer = torch.optim.SGD([torch.ones(1)], lr=1.0)
    with pytest.raises(ValueError, match=message):
        PolynomialWarmup(optimizer, **{"decay_steps": 10} | options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosine", {"total_steps": "12"}, "total_steps='12' must be a number"),
        ("cosine", {"total_steps": None}, "total_steps=None must be a number"),
        ("step_decay", {"milestones": 5}, "milestones=5 must be a sequence of numbers"),
        ("step_decay", {"milestones": "345"}, "milestones='345' must be a sequence of numbers"),
        ("step_decay", {"milestones": [3, "a"]}, "milestones='a' must be a number"),
    ],
)
def test_options_that_are_not_numbers_are_refused_by_name(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        FunctionLR(sgd(1.0), name, **options)


def test_the_state_is_plain_for_numbers_of_any_library() -> None:
    optimizer = sgd(1.0)
    for scheduler in (
        PolynomialWarmup(optimizer, np.int64(9), warmup_steps=np.float64(2.5), power=np.float32(2)),
        FunctionLR(optimizer, "step_decay", milestones=np.array([3, 6]), gamma=torch.tensor(0.5)),
        GradualWarmup(optimizer, np.float64(2), np.int64(3)),
    ):
        saved = io.BytesIO()
        torch.save(scheduler.state_dict(), saved)
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
        assert "tensor" not in repr(state)
