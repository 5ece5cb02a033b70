"""Schedules as functions, compared with numbers from the published implementations."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import golden
from lars.schedules import (
    constant_warmup,
    cosine,
    epochwise_polynomial,
    polynomial,
    scale_lr,
    step_decay,
    warmup,
)

GOLDENS = golden("schedules.json")


def close(got: float, want: float) -> bool:
    return math.isclose(got, want, rel_tol=1e-12, abs_tol=1e-15)


def test_polynomial_without_warmup_equals_nus_and_cmpark() -> None:
    nus = GOLDENS["nus_polynomial_decay"]
    for step, want in enumerate(nus["lr"]):
        got = polynomial(
            step,
            peak=nus["base_lr"],
            total_steps=nus["decay_steps"],
            end_lr=nus["end_lr"],
            power=nus["power"],
        )
        assert close(got, want)
    cmpark = GOLDENS["cmpark_polynomial_alone"]
    for step, want in cmpark["last_step_and_lr"]:
        got = polynomial(
            step,
            peak=cmpark["base_lr"],
            total_steps=cmpark["max_decay_steps"],
            end_lr=cmpark["end"],
            power=cmpark["power"],
        )
        assert close(got, want)


@pytest.mark.parametrize("recipe", GOLDENS["nus_recipes"].values(), ids=GOLDENS["nus_recipes"])
def test_published_recipes(recipe: dict[str, Any]) -> None:
    for step, want in recipe["lr_at_step"].items():
        got = polynomial(
            int(step),
            peak=recipe["base_lr"],
            total_steps=recipe["decay_steps"],
            warmup_steps=recipe["warmup_steps"],
        )
        assert close(got, want), f"step {step}"


def test_step_decay_equals_the_lambda_of_nus() -> None:
    golden = GOLDENS["nus_create_lr_schedule"]
    for epoch, want in golden["factor_at_epoch"].items():
        got = step_decay(
            float(epoch),
            peak=1.0,
            milestones=golden["decay"],
            gamma=golden["alpha"],
            warmup_steps=golden["warmup_epochs"],
            start_factor=1 / golden["workers"],
        )
        assert close(got, want), f"epoch {epoch}"


def test_scaling_rules() -> None:
    golden = GOLDENS["nus_lr_scaling"]
    for rule, want in (("linear", "linear"), ("keep", "keep"), ("sqrt", "sqrt_rule")):
        assert close(scale_lr(golden["base_lr"], factor=golden["k"], rule=rule), golden[want])
    with pytest.raises(ValueError, match="choose one of: keep, linear, sqrt"):
        scale_lr(0.1, factor=2, rule="square")


LOOPS = GOLDENS["cmpark_train_loop"]["cases"]


@pytest.mark.parametrize("case", LOOPS.values(), ids=LOOPS.keys())
def test_epochwise_polynomial_equals_the_loop_of_cmpark(case: dict[str, Any]) -> None:
    step = 0
    for epoch in case["lr_epoch_iter"]:
        for want in epoch:
            got = epochwise_polynomial(
                step,
                peak=case["base_lr"] * case["warmup_multiplier"],
                steps_per_epoch=case["iters_per_epoch"],
                warmup_epochs=case["warmup_epoch"],
                decay_epochs=case["max_decay_epoch"],
                start_factor=1 / case["warmup_multiplier"],
                end_lr=case["end_learning_rate"],
            )
            assert close(got, want), f"step {step}"
            step += 1
    assert step == case["epochs"] * case["iters_per_epoch"]


LARS_WARM = GOLDENS["tvlars_adjust_learning_rate"]["cases"]


@pytest.mark.parametrize("case", LARS_WARM.values(), ids=LARS_WARM.keys())
def test_cosine_equals_lars_warm_of_tvlars_but_does_not_rise_again(case: dict[str, Any]) -> None:
    peak = case["lr_arg"] * case["bs"] / 256
    total = case["epochs"] * case["steps_per_epoch"]
    options = {
        "peak": peak,
        "total_steps": total,
        "warmup_steps": 20 * case["steps_per_epoch"],
        "end_lr": 0.001 * peak,
    }
    for step, want in case["lr_at_step"].items():
        if int(step) <= total:
            assert close(cosine(int(step), **options), want), f"step {step}"
        else:
            assert close(cosine(int(step), **options), options["end_lr"]), f"step {step}"


def test_cosine_falls_over_the_whole_run() -> None:
    """The tvlars code mixes up epochs and steps, so its rate oscillates."""
    swinging = GOLDENS["tvlars_cosine_stepped_per_iteration"]["lr"]
    assert swinging[10] > swinging[5]
    falling = [cosine(step, peak=1.0, total_steps=50) for step in range(51)]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] == 1.0
    assert close(falling[5], swinging[0] * (1 + math.cos(math.pi / 10)) / 2)


def test_constant_warmup() -> None:
    got = [constant_warmup(step, peak=2.0, warmup_steps=2, start_factor=0.25) for step in range(4)]
    assert got == [0.5, 0.5, 2.0, 2.0]


def test_a_run_that_is_all_warmup_ends_at_its_end_lr() -> None:
    for schedule in (polynomial, cosine):
        assert schedule(9, peak=1.0, total_steps=10, warmup_steps=10) == 0.9
        assert schedule(10, peak=1.0, total_steps=10, warmup_steps=10, end_lr=0.125) == 0.125


@given(
    peak=st.floats(1e-6, 64),
    total=st.floats(1, 1e5),
    share=st.floats(0, 1),
    step=st.floats(0, 2e5),
    power=st.floats(0.5, 4),
    end_share=st.floats(0, 1),
)
def test_rates_stay_between_zero_and_peak(
    peak: float, total: float, share: float, step: float, power: float, end_share: float
) -> None:
    options = {
        "peak": peak,
        "total_steps": total,
        "warmup_steps": share * total,
        "end_lr": end_share * peak,
    }
    whole = math.floor(step)
    for rate in (
        polynomial(whole, power=power, **options),
        cosine(whole, **options),
        warmup(whole, peak=peak, warmup_steps=share * total),
    ):
        assert 0 <= rate <= peak * (1 + 1e-12)


def test_no_rate_exceeds_the_peak_at_fractions_of_a_step() -> None:
    assert polynomial(10.3, peak=1.0, total_steps=100, warmup_steps=10.2) == 1.0
