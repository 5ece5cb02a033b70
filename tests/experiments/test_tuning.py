"""Every optimizer gets the same tuning budget, and the best setting is trained with the other seeds."""

from __future__ import annotations

import csv
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from experiments import published, report
from experiments.cells import Result, settings_of
from experiments.large_batch_ladder import PRESETS as LADDERS
from experiments.lars_forms import PRESETS as FORMS
from experiments.train_with_outlier import Outlier, insert
from experiments.tuning import Ladder, Line
from experiments.tvlars_grid import PRESETS as GRIDS
from lars.learner.learner import Learner

ALL = {**{f"ladder {k}": v for k, v in LADDERS.items()}, **{f"forms {k}": v for k, v in FORMS.items()},
       **{f"grid {k}": v for k, v in GRIDS.items()}}  # fmt: skip


def ladder(*options: tuple[str, ...]) -> Ladder:
    line = Line(
        "Some Optimizer",
        ("--base-op", "sgd"),
        lambda batch: [1.0, 2.0, 4.0],
        lambda batch: options or ((),),
    )
    return Ladder(
        "title", (line,), (8,), lambda batch: ("--batch-size", str(batch)), seeds=(0, 1, 2)
    )


def run_all(study, top1_of) -> dict[str, Result]:
    """Give every cell the top-1 that a function of its labels returns, until no cell is left."""
    results: dict[str, Result] = {}
    while todo := [cell for cell in study.cells(results) if cell.name not in results]:
        top1 = top1_of(todo[0].labels)
        code = 5 if math.isnan(top1) else 0
        results[todo[0].name] = Result(todo[0].name, todo[0].labels, {}, top1, top1, 3, 1.0, code)
    return results


def rates_of(results: dict[str, Result], seed: int) -> list[float]:
    return [r.labels["lr"] for r in results.values() if r.labels["seed"] == seed]


def test_the_best_rate_is_trained_with_the_other_seeds():
    study = ladder()
    assert study.still_unknown({}) == 2
    results = run_all(study, lambda labels: 90 - abs(labels["lr"] - 2))
    assert rates_of(results, 0) == [1, 2, 4]
    assert rates_of(results, 1) == rates_of(results, 2) == [2]
    (point,) = study.points(results)
    assert (point.lr, point.at_edge, point.tried, point.all_top1) == (2, False, 3, (90, 90, 90))
    assert study.still_unknown(results) == 0


@pytest.mark.parametrize(
    ("best", "rates", "at_edge"),
    [(8, [1, 2, 4, 8, 16], False), (0.5, [1, 2, 4, 0.5, 0.25], False), (64, [1, 2, 4, 8, 16], True)],
)  # fmt: skip
def test_the_grid_grows_while_the_best_rate_is_at_its_edge(best, rates, at_edge):
    study = ladder()
    results = run_all(study, lambda labels: 90 - abs(math.log2(labels["lr"] / best)))
    assert rates_of(results, 0) == rates
    assert study.points(results)[0].at_edge == at_edge


def test_the_best_rate_is_tried_with_the_other_options():
    study = ladder(("--warmup-epochs", "1"), ("--warmup-epochs", "2"))
    results = run_all(study, lambda labels: 90 - abs(labels["lr"] - 2) + labels["option"])
    (point,) = study.points(results)
    assert (point.lr, point.options, point.tried) == (2, "--warmup-epochs 2", 4)
    cell = study.with_other_seeds(study.all_tuned(results)[0])[0]
    assert cell.name == "some-optimizer_b8_lr2_option1_seed1"
    assert cell.flags[-4:] == ("--warmup-epochs", "2", "--seed", "1")


def test_a_training_that_diverged_counts_as_chance(tmp_path):
    study = ladder()
    results = run_all(
        study, lambda labels: math.nan if labels["seed"] == 1 or labels["lr"] > 2 else 90
    )
    (point,) = study.points(results)
    assert point.lr in (1, 0.5, 0.25)
    assert (point.all_top1, point.diverged) == ((90, 10, 90), 1)
    study.report(results, tmp_path, "python study.py")
    assert "| 8 | 63.33 ± 46.19 |" in (tmp_path / "table.md").read_text()
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == len(results)
    assert {row["exit_code"] for row in rows} == {"0", "5"}
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.size == (1080, 680)


@pytest.mark.parametrize("name", ALL)
def test_every_preset_can_be_run_to_its_end_and_reported(name, tmp_path):
    study = ALL[name]
    study.report({}, tmp_path, "python study.py")
    results = run_all(study, lambda labels: 50 + 10 * math.sin(labels["lr"]) - labels["seed"])
    cells = study.cells(results)
    for cell in cells[:: max(1, len(cells) // 8)]:  # the trainer accepts their flags
        settings_of(cell)
    names = [cell.name for cell in cells]
    assert len(names) == len(set(names)) == len(results)
    study.report(results, tmp_path, "python study.py")
    assert (tmp_path / "table.md").read_text().count("|") > 10
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_published_settings_follow_the_published_rules():
    """Attempt 4: batch 128 k, rate 0.02 k, a warm-up to 5 times the rate, end rate 1e-5 k."""
    study = LADDERS["cifar10-attempt4"]
    sgd, lars = (cell for cell in study.cells({}) if cell.labels["batch"] == 8192)
    assert [float(sgd.flags[sgd.flags.index(f) + 1]) for f in ("--base-lr", "--warmup-multiplier", "--end-lr")] == [
        1.28, 5, 64e-5,
    ]  # fmt: skip
    assert "kaiming_uniform" in sgd.flags
    assert lars.flags[lars.flags.index("--wd") + 1] == "5e-3"
    assert study.published["LARS"][8192] == 86.56
    assert len(published.rows("imagenet-table")) == 10


def test_the_outlier_changes_the_gradient_of_one_step(monkeypatch):
    seen = []
    monkeypatch.setattr(
        Learner,
        "_update",
        lambda self, step, samples: seen.append(self.gradients.parameters[0].grad.item()),
    )
    insert(Outlier(outlier_step=2, outlier_factor=100.0))
    for step in range(3):
        weight = torch.nn.Parameter(torch.zeros(()))
        weight.grad = torch.ones(())
        learner = SimpleNamespace(
            gradients=SimpleNamespace(parameters=[weight, torch.nn.Parameter(torch.zeros(()))])
        )
        Learner._update(learner, step, 1)
    assert seen == [1, 100, 1]


def test_a_missing_training_is_not_shown_as_diverged():
    nan = math.nan
    assert [report.mean_text(seeds) for seeds in ([], [nan], [90.0, nan, 80.0], [90.0, 80.0])] == [
        "", "1 of 1 diverged", "1 of 3 diverged", "85.0",
    ]  # fmt: skip
