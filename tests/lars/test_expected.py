"""Published curves, and how a run compares with them."""

from __future__ import annotations

import math
import re
import types

import pytest

from conftest import golden
from lars.config import Config, UsageError
from lars.config.plan import make_plan
from lars.expected import FAR_BELOW, Curve, Range, curve_near, curves
from lars.observe.observer import Training
from lars.observe.on_track import OnTrack, comparison
from lars.observe.plan_lines import expected_curve

IMAGENET = 1_281_167
PUBLISHED = golden("published_curves.json")
POOLED = [group for group in PUBLISHED["groups"] if group["closed"]]
OTHERS = [group for group in PUBLISHED["groups"] if group["approximate"] and group["batch"] > 256]


def ranges(run: dict, values: list[float]) -> list[tuple[float, Range]]:
    """The accuracies of a run with the published ones that they compare with."""
    curve = curve_near(run["batch"])
    assert curve is not None
    steps = math.ceil(IMAGENET / run["batch"])
    found = (
        (value, curve.at(epoch, epoch * steps, run["schedule_epochs"]))
        for epoch, value in zip(run["epochs"], values, strict=True)
    )
    return [(value, published) for value, published in found if published is not None]


def test_the_curves_are_ordered_and_complete():
    assert sum(curve.runs for curve in curves().values()) > 1300
    for curve in curves().values():
        rows = (curve.min, curve.p5, curve.median, curve.p95, curve.max)
        assert {len(row) for row in rows} == {len(curve.epochs)} == {len(curve.n)}
        assert sorted(curve.epochs) == list(curve.epochs)
        for values in zip(*rows, strict=True):
            assert sorted(values) == list(values)
            assert 0.1 <= values[0] <= values[-1] < 80
        assert curve.name == f"mlperf-{re.sub('.*-', '', curve.name)}"


@pytest.mark.parametrize("group", POOLED, ids=lambda group: group["id"])
def test_no_published_run_is_warned(group):
    """The lowest accuracy of 4 or 5 runs at each epoch. No run is lower than the published range."""
    compared = ranges(group, group["min"])
    assert len(compared) >= 8
    assert all(value >= published.low for value, published in compared)


@pytest.mark.parametrize("group", OTHERS, ids=lambda group: group["id"])
def test_good_runs_that_are_not_in_the_pool_are_not_warned(group):
    """Curves of 90 epochs with other forms of LARS, read off pictures."""
    compared = ranges(group, group["min"])
    assert len(compared) >= 5
    assert all(value >= FAR_BELOW * published.low for value, published in compared)


def test_the_run_that_never_learned_is_warned_at_its_first_validation():
    dead = PUBLISHED["dead"]
    curve = curve_near(dead["batch"])
    compared = ranges(dead, dead["top1"])
    assert len(compared) == len(dead["epochs"])
    for value, published in compared:
        assert comparison(2, value, published, curve).startswith(
            "warning: epoch 2: val top-1 0.10 %"
        )


@pytest.mark.parametrize("batch", [1024, 3264, 8192, 16384, 32768])
def test_a_run_at_chance_level_is_warned_after_two_epochs(batch):
    curve = curve_near(batch)
    warned = [
        epoch
        for epoch in range(1, 6)
        if (published := curve.at(epoch, epoch * math.ceil(IMAGENET / batch), 90)) is not None
        and comparison(epoch, 0.1, published, curve).startswith("warning")
    ]
    assert warned
    assert min(warned) <= 3


def test_chance_level_is_normal_after_the_first_epoch_of_the_largest_batches():
    curve = curve_near(65536)
    published = curve.at(1, 20, 90)
    assert "after 15 to 30 steps" in published.when
    assert comparison(1, 0.1, published, curve).endswith("on track")


def test_epochs_between_published_ones_take_both_neighbours():
    curve = curves()["mlperf-408"]
    assert curve.at(5, 10_000, 37) == Range(37.42, 52.52, 5, "after epochs 4 and 7")
    assert curve.at(3, 10_000, 37) == Range(34.8, 40.34, 30, "after epoch 3")
    assert curve.at(2, 10_000, 37) is None, "no run was evaluated so early"


def test_late_epochs_compare_only_with_schedules_of_the_same_length():
    curve = curves()["mlperf-8192"]
    assert curve.at(30, 5000, 44) is not None
    assert curve.at(30, 5000, 90) is None
    assert curve.at(14, 5000, 90) is not None


def test_early_steps_of_large_batches_count_more_than_epochs():
    """Epoch 1 with a batch size of 16384 has 79 steps. Published runs with this size begin at epoch 3."""
    assert curves()["mlperf-16384"].at(1, 79, 90) == Range(1.42, 3.46, 15, "after 70 to 90 steps")
    assert curves()["mlperf-16384"].at(1, 100, 90).when == "after 70 to 130 steps"
    assert curves()["mlperf-16384"].at(1, 5, 90) is None
    assert curves()["mlperf-3264"].at(1, 79, 90).when == "after epoch 1"


@pytest.mark.parametrize(
    ("batch", "name"),
    [(256, None), (512, "mlperf-408"), (9000, "mlperf-8192"), (49152, "mlperf-57344"), (1 << 17, None)],
)  # fmt: skip
def test_the_nearest_batch_size_is_chosen(batch, name):
    curve = curve_near(batch)
    assert (curve and curve.name) == name


def chosen(*, classes: int = 1000, samples: int = IMAGENET, **flags) -> Curve | None:
    config = Config(**{"base_op": "lars", "batch_size": 64, "effective_batch_size": 8192} | flags)
    plan = make_plan(config, size=1, train_size=samples)
    return expected_curve(config, plan, types.SimpleNamespace(num_classes=classes))


def test_only_comparable_runs_are_compared():
    assert chosen().name == "mlperf-8192"
    assert chosen(samples=IMAGENET - 100).name == "mlperf-8192", "a few images were excluded"
    assert chosen(base_op="sgd") is None
    assert chosen(model="resnet18") is None
    assert chosen(classes=100) is None
    assert chosen(samples=IMAGENET // 2) is None
    assert chosen(expected_curve="none") is None
    assert chosen(base_op="sgd", classes=10, expected_curve="mlperf-408").name == "mlperf-408"


def test_an_unknown_curve_is_refused():
    with pytest.raises(UsageError, match=r"--expected-curve mlperf-9 .*mlperf-8192"):
        Config(expected_curve="mlperf-9")


CURVE = curves()["mlperf-32768"]
PUBLISHED_RANGE = Range(10.0, 20.0, 7, "after epoch 5")


@pytest.mark.parametrize(
    ("top1", "drop", "words"),
    [
        (15.0, 0.0, "had 10.0 to 20.0 % after epoch 5 (7 runs): on track"),
        (25.0, 0.0, "on track, and higher than all of them"),
        (9.0, 0.0, "a little lower"),
        (9.0, 5.0, "the drop of 5.0 points is normal: 78 % of the published runs"),
        (4.9, 5.0, "far below all of them. Check the labels"),
    ],
)
def test_the_line_after_a_validation(top1, drop, words):
    line = comparison(5, top1, PUBLISHED_RANGE, CURVE, drop=drop)
    assert words in line
    assert line.startswith("warning") == (top1 < 5)


def test_a_drop_is_not_called_normal_where_it_is_rare():
    line = comparison(5, 15.0, PUBLISHED_RANGE, curves()["mlperf-3264"], drop=5.0)
    assert line.endswith("on track")


def observed(history: list[dict], **flags) -> OnTrack:
    config = Config(batch_size=64, effective_batch_size=64, expected_curve="mlperf-408", **flags)
    run = types.SimpleNamespace(plan=make_plan(config, size=1, train_size=6400))
    return OnTrack(Training(config, None, run, None, types.SimpleNamespace(history=history)))


def row(epoch: int, top1: float, split: str = "val") -> dict:
    return {"split": split, "epoch": epoch, "step": 100 * epoch, "top1": top1}


def test_the_observer_compares_the_newest_validation(capsys):
    history = [row(3, 38.0), row(4, 1.0), row(4, 1.0, "val_ema")]
    observed(history[:1]).validated()
    observed(history).validated()
    first, second = capsys.readouterr().out.splitlines()
    assert "  epoch 3: val top-1 38.00 %" in first, "after the date"
    assert first.endswith("on track")
    assert "  warning: epoch 4: val top-1 1.00 %" in second


def test_the_observer_is_silent_without_published_values(capsys):
    observed([row(1, 0.1)]).validated()  # the curve begins at epoch 3
    observed([{"split": "val", "epoch": 3, "step": 300, "loss": 1.0}]).validated()  # another task
    assert capsys.readouterr().out == ""
