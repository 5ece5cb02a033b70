"""The plan: accumulation, steps, learning rates, and the samples of each step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import golden
from lars.config import Config, UsageError
from lars.config.plan import make_plan

IMAGENET = 1_281_167


@pytest.mark.parametrize(
    ("effective", "batch", "ranks", "base_lr", "warmup"),
    [
        (512, 64, 8, 4.0, 10 / 64),
        (1024, 128, 8, 2**2.5, 10 / 32),
        (8192, 128, 64, 16.0, 2.5),
        (16384, 128, 128, 2**4.5, 5),
    ],
)
def test_published_recipes_give_the_published_numbers_of_steps(
    effective, batch, ranks, base_lr, warmup
):
    recorded = golden("schedules.json")["nus_recipes"][str(effective)]
    config = Config(batch_size=batch, base_lr=base_lr, warmup_epochs=warmup)
    plan = make_plan(config, size=ranks, train_size=IMAGENET)
    assert plan.steps_per_epoch == recorded["steps_per_epoch"]
    assert plan.warmup_steps == pytest.approx(recorded["warmup_steps"], rel=1e-12)
    assert plan.total_steps == recorded["decay_steps"]
    # The same plan from --effective-batch-size on an eighth of the ranks.
    fewer = Config(
        batch_size=batch, effective_batch_size=effective, base_lr=base_lr, warmup_epochs=warmup
    )
    plan_of_fewer = make_plan(fewer, size=ranks // 8, train_size=IMAGENET)
    assert plan_of_fewer.accumulation == 8
    assert (plan_of_fewer.total_steps, plan_of_fewer.peak_lr) == (plan.total_steps, plan.peak_lr)


@pytest.mark.parametrize(("rule", "peak"), [("keep", 0.1), ("linear", 1.6), ("sqrt", 0.4)])
def test_lr_scaling(rule, peak):
    recorded = golden("schedules.json")["nus_lr_scaling"]
    assert peak == pytest.approx(recorded["sqrt_rule" if rule == "sqrt" else rule], rel=1e-12)
    config = Config(base_lr=0.1, lr_scaling=rule, batches_per_allreduce=4)
    assert make_plan(config, size=4, train_size=10**6).peak_lr == pytest.approx(peak, rel=1e-12)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            Config(batch_size=32, effective_batch_size=100),
            ["--effective-batch-size 100", "64 or 128"],
        ),
        (Config(batch_size=32, effective_batch_size=32), ["--effective-batch-size 32", "use 64"]),
        (
            Config(batch_size=32, effective_batch_size=128, batches_per_allreduce=4),
            ["--batches-per-allreduce", "2"],
        ),
        (Config(batch_size=4096, drop_last=True), ["--drop-last", "8192"]),
    ],
)
def test_flags_that_do_not_fit_are_refused_with_the_fix(config, words):
    with pytest.raises(UsageError) as error:
        make_plan(config, size=2, train_size=5000)
    assert all(word in str(error.value) for word in words)


@given(
    train_size=st.integers(1, 300),
    size=st.integers(1, 8),
    batch=st.integers(1, 9),
    accumulation=st.integers(1, 5),
)
def test_the_steps_of_an_epoch_contain_every_sample_once(train_size, size, batch, accumulation):
    config = Config(batch_size=batch, batches_per_allreduce=accumulation)
    plan = make_plan(config, size=size, train_size=train_size)
    samples = [plan.samples_in(k) for k in range(plan.steps_per_epoch)]
    assert sum(samples) == train_size
    assert all(n == plan.effective_batch_size for n in samples[:-1])
    for k, n in enumerate(samples):
        count = plan.micro_batches_in(k)
        assert (count - 1) * size * batch < math.ceil(n / batch) * batch
        assert count * size * batch >= n
