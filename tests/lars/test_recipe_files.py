"""How recipes are found and read: @FILE, --recipe NAME, --recipe list."""

from __future__ import annotations

import sys

import pytest

from conftest import run
from data.sources.imagenet import ImageNet
from lars.config import Config, parse, recipes

NAMES = list(recipes.names())


def read(*argv: str) -> Config:
    return parse(argv, Config, ImageNet, description="")[0]


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
    with pytest.raises(SystemExit, match="2"):
        read("@imagenet_mlperf_8192.args")
    assert "did you mean --recipe imagenet_mlperf_8192?" in capsys.readouterr().err


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
