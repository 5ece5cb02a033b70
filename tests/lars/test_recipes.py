"""The recipes in launch/recipes/: they parse, fit the number of GPUs that they name, and have a source."""

from __future__ import annotations

import re
import sys

import pytest

from conftest import run
from data.sources.imagenet import ImageNet
from lars.config import Config, parse, recipes
from lars.config.plan import make_plan
from lars.expected import curves
from lars.learner.build import schedule

IMAGENET = 1_281_167
NAMES = list(recipes.names())


def read(*argv: str) -> Config:
    return parse(argv, Config, ImageNet, description="")[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_the_numbers_of_gpus_that_it_names(name):
    config, text = read("--recipe", name), recipes.names()[name].read_text()
    divides = re.search(r"number of\s+(?:# )?GPUs must\s+(?:# )?divide (\d+)", text)
    most = int(divides[1]) if divides else 1
    for size in (1, most):
        plan = make_plan(config, size=size, train_size=IMAGENET)
        assert str(plan.effective_batch_size) in name
    assert plan.accumulation == 1 or not divides
    rates = [schedule(config, plan)(step) for step in range(0, plan.total_steps, 97)]
    assert 0.9 * plan.peak_lr < max(rates) <= plan.peak_lr


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_states_its_result_and_its_source(name):
    text = recipes.names()[name].read_text()
    assert re.search(r"^# Result: .*\d %", text, re.MULTILINE)
    assert re.search(r"^# Source: \S", text, re.MULTILINE)
    assert name.startswith("digits") or "# Not reproduced here." in text


@pytest.mark.parametrize("name", [name for name in NAMES if re.match(r"imagenet_mlperf_\d", name)])
def test_an_mlperf_recipe_is_as_submitted(name):
    config = read("--recipe", name)
    assert (config.lars_form, config.epsilon, config.trust_coefficient) == ("mlperf", 0, 0.001)
    assert (config.lr_power, config.end_lr, config.label_smoothing) == (2, 1e-4, 0.1)
    result = re.search(r"after ([\d.]+) epochs", recipes.names()[name].read_text())
    assert 0.94 < float(result[1]) / config.epochs < 0.98
    # Its schedule is as long as those of the published runs with which it is compared.
    curve = curves()[config.expected_curve]
    assert curve.last_epoch(config.epochs) == curve.epochs[-1]


def test_the_lamb_recipe_takes_the_published_steps():
    plan = make_plan(read("--recipe", "imagenet_lamb_32768"), size=1, train_size=IMAGENET)
    assert plan.total_steps == pytest.approx(3519, rel=0.003)
    assert plan.warmup_steps == pytest.approx(782, rel=0.003)


@pytest.mark.parametrize("name", ["imagenet_nesterov_512", "imagenet_nesterov_2048"])
def test_the_nesterov_recipes_take_the_published_steps(name):
    plan = make_plan(read("--recipe", name), size=1, train_size=IMAGENET)
    published = re.search(r"\((\d+) steps\)", recipes.names()[name].read_text())
    assert plan.total_steps == int(published[1])


def test_the_list_names_every_recipe_once(tmp_path):
    for argv in (["--recipe", "list"], ["--recipe=list", "--wd", "x"]):
        done = run(sys.executable, "train_imagenet.py", *argv)
        assert done.returncode == 0, done.stderr
        rows = [line.split() for line in done.stdout.splitlines()[1:] if line]
        assert [row[0] for row in rows[:-1]] == NAMES
    rows = {row[0]: row for row in rows[:-1]}
    assert rows["imagenet_mlperf_8192"][1:5] == ["8192", "lars", "(mlperf)", "44"]
    assert rows["digits_sgd_1024"][1:4] == ["1024", "sgd", "20"]


def test_an_unknown_recipe_is_refused_with_the_nearest_name(capsys):
    with pytest.raises(SystemExit, match="2"):
        read("--recipe", "imagenet_mlperf_819")
    assert "did you mean imagenet_mlperf_8192?" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        read("--recipe")
    assert "--recipe list shows all" in capsys.readouterr().err


def test_a_recipe_is_found_beside_the_recipe_that_includes_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "one.args").write_text("@two.args\n")
    (tmp_path / "recipes" / "two.args").write_text("--wd 3\n")
    monkeypatch.chdir(tmp_path)
    assert read("@recipes/one.args").wd == 3
    # The old rule also holds: a path relative to the current directory.
    (tmp_path / "recipes" / "one.args").write_text("@recipes/two.args\n")
    assert read("@recipes/one.args").wd == 3
    (tmp_path / "recipes" / "two.args").write_text("\n@../recipes/one.args\n")
    with pytest.raises(SystemExit, match="2"):
        read("@recipes/one.args")
    assert "@../recipes/one.args includes itself" in capsys.readouterr().err


def test_later_flags_override_a_named_recipe_and_errors_name_its_line(capsys):
    config = read("--recipe", "imagenet_mlperf_8192", "--wd", "1e-4")
    assert (config.wd, config.base_lr) == (1e-4, 17)
    with pytest.raises(SystemExit, match="2"):
        read("--wd", "x", "--recipe", "imagenet_mlperf_8192")
    # A flag of LARS in a recipe is no error if the command line chooses another optimizer.
    assert read("--recipe", "imagenet_mlperf_8192", "--base-op", "sgd").base_op == "sgd"
