"""The learning rate that the flags give, step by step."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from conftest import golden
from lars.config import Config, parse
from lars.config.plan import make_plan
from lars.learner.build import schedule

GOLDENS = golden("schedules.json")


def read(*argv: str) -> Config:
    return parse(argv, Config, description="")[0]


def rate(*argv: str, steps_per_epoch: int = 10) -> Callable[[int], float]:
    config = read(*argv)
    batch = config.effective_batch_size or config.batch_size * config.batches_per_allreduce
    return schedule(config, make_plan(config, size=1, train_size=batch * steps_per_epoch))


LOOPS = GOLDENS["cmpark_train_loop"]["cases"]


@pytest.mark.parametrize("name", LOOPS)
def test_epochwise_polynomial_is_the_training_loop_of_cmpark(name):
    case = LOOPS[name]
    rate_at = rate(
        *("--lr-schedule", "epochwise-polynomial", "--lr-power", "2", "--lr-scaling", "keep"),
        *("--base-lr", str(case["base_lr"]), "--end-lr", str(case["end_learning_rate"])),
        *("--warmup-multiplier", str(case["warmup_multiplier"])),
        *("--warmup-epochs", str(case["warmup_epoch"]), "--epochs", str(case["max_decay_epoch"])),
        steps_per_epoch=case["iters_per_epoch"],
    )
    published = [lr for epoch in case["lr_epoch_iter"] for lr in epoch]
    ours = [rate_at(step) for step in range(len(published))]
    assert ours == pytest.approx(published, rel=1e-12)


LARS_WARM = GOLDENS["tvlars_adjust_learning_rate"]["cases"]


@pytest.mark.parametrize("name", LARS_WARM)
def test_lars_warm_is_the_schedule_of_tvlars_without_the_later_rise(name):
    case = LARS_WARM[name]
    total = case["epochs"] * case["steps_per_epoch"]
    rate_at = rate(
        *("--lr-schedule", "lars-warm", "--base-op", "lars", "--base-lr", str(case["lr_arg"])),
        *("--epochs", str(case["epochs"]), "--effective-batch-size", str(case["bs"])),
        steps_per_epoch=case["steps_per_epoch"],
    )
    compared = {int(step): lr for step, lr in case["lr_at_step"].items() if int(step) <= total}
    assert len(compared) > 5
    ours = {step: rate_at(step) for step in compared}
    assert ours == pytest.approx(compared, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", ["polynomial", "cosine", "step", "constant"])
def test_a_warm_up_with_a_multiplier_starts_at_the_base_rate(name):
    rate_at = rate(
        *("--lr-schedule", name, "--base-lr", "0.1", "--warmup-multiplier", "8"),
        *("--warmup-epochs", "2", "--epochs", "40"),
    )
    assert rate_at(0) == pytest.approx(0.1, rel=1e-12)
    assert rate_at(10) == pytest.approx(0.45, rel=1e-12)
    assert rate_at(20) == pytest.approx(0.8, rel=1e-12)


def test_scaling_multiplies_both_ends_of_a_warm_up_with_a_multiplier():
    rate_at = rate(
        *("--lr-schedule", "constant", "--base-lr", "0.1", "--warmup-multiplier", "2"),
        *("--lr-scaling", "linear", "--batches-per-allreduce", "4", "--warmup-epochs", "1"),
    )
    assert [rate_at(0), rate_at(10)] == pytest.approx([0.4, 0.8], rel=1e-12)


def test_none_is_a_constant_rate_without_a_warm_up():
    rate_at = rate("--lr-schedule", "none", "--base-lr", "0.3", "--epochs", "4")
    assert {rate_at(step) for step in range(40)} == {0.3}
    config = Config(lr_schedule="none", base_lr=0.3)
    assert make_plan(config, size=1, train_size=320).warmup_steps == 0


def test_a_ramp_grows_by_the_same_factor_per_step():
    rate_at = rate("--lr-schedule", "ramp", "--base-lr", "0.01", "--end-lr", "10", "--epochs", "4")
    rates = [rate_at(step) for step in range(40)]
    assert (rates[0], rates[-1]) == pytest.approx((0.01, 10), rel=1e-12)
    factors = [after / before for before, after in itertools.pairwise(rates)]
    assert factors == pytest.approx([1000 ** (1 / 39)] * 39, rel=1e-9)


def test_tvlars_has_no_warm_up_and_no_decay_unless_they_are_given():
    flags = ("--base-op", "tvlars", "--base-lr", "2", "--epochs", "4")
    plain = rate(*flags)
    assert {plain(step) for step in range(40)} == {2.0}
    for power in ((), ("--lr-power", "2"), ("--end-lr", "0.1"), ("--lr-scaling", "keep")):
        with_flag = rate(*flags, *power)
        assert {with_flag(step) for step in range(40)} == {2.0}, "a flag alone adds no decay"
    decaying = rate(*flags, "--lr-schedule", "polynomial", "--lr-power", "2")
    assert decaying(0) == 2.0
    assert decaying(20) == pytest.approx(0.5)
    warming = rate(*flags, "--warmup-epochs", "1")
    assert [warming(0), warming(5), warming(39)] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--warmup-multiplier", "0.5"], ["--warmup-multiplier", "at least 1"]),
        (["--warmup-multiplier", "2", "--warmup-epochs", "0"], ["needs a warm-up"]),
        (["--warmup-multiplier", "2", "--base-op", "tvlars"], ["needs a warm-up"]),
        (["--warmup-multiplier", "2", "--lr-schedule", "lars-warm"], ["has no effect with"]),
        (["--warmup-multiplier", "2", "--lr-schedule", "ramp"], ["has no effect with"]),
        (["--lr-schedule", "ramp", "--base-lr", "0.1"], ["larger --end-lr, not 0.1 and 0"]),
        (["--lr-schedule", "ramp", "--base-lr", "0", "--end-lr", "1"], ["a --base-lr above 0"]),
        (
            ["--lr-schedule", "epochwise-polynomial", "--warmup-epochs", "1.5"],
            ["--warmup-epochs 1.5", "a whole number"],
        ),
    ],
)
def test_rates_without_a_meaning_are_refused(argv, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        read(*argv)
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("argv", "ignored"),
    [
        (["--end-lr", "0.1", "--lr-power", "2", "--lr-decay", "3"], ["lr_decay"]),
        (["--lr-schedule", "step", "--end-lr", "0.1", "--lr-power", "2"], ["lr_power", "end_lr"]),
        (["--lr-schedule", "none", "--warmup-epochs", "3"], ["warmup_epochs"]),
        (["--lr-schedule", "lars-warm", "--lr-scaling", "linear"], ["lr_scaling"]),
        (["--base-op", "tvlars"], []),
        (["--base-op", "tvlars", "--lr-power", "2"], ["lr_power"]),
        (["--lr-schedule", "lars-warm", "--warmup-epochs", "3"], []),
        (["--lr-schedule", "epochwise-polynomial", "--lr-power", "2"], []),
    ],
)
def test_flags_that_the_schedule_ignores_are_found(argv, ignored):
    assert read(*argv).ignored_by_the_schedule() == ignored
