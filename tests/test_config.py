"""Flags: names and defaults of the published trainer, refusals in the flag's own name, recipes."""

from __future__ import annotations

import dataclasses
import sys
import time

import pytest

from conftest import ROOT, run
from lars import config as config_room
from lars.config import Config, UsageError, identity, parse

# epsilon's None is 1e-5 in the one form that was published with these.
PUBLISHED_DEFAULTS = {
    "log_dir": "./logs/imagenet", "checkpoint_format": "checkpoint-{epoch}.pth.tar", "fp16_allreduce": False,
    "batches_per_allreduce": 1, "model": "resnet50", "batch_size": 32, "val_batch_size": 32, "epochs": 90,
    "base_lr": 0.0125, "lr_decay": (30, 60, 80), "warmup_epochs": 5.0, "momentum": 0.9, "wd": 5e-5,
    "epsilon": None, "label_smoothing": 0.1, "base_op": "sgd", "lr_scaling": "keep", "no_cuda": False,
    "single_threaded": False, "seed": 42,
}  # fmt: skip


def read(*argv: str) -> Config:
    return parse(argv, Config, description="")[0]


def test_the_published_flags_keep_their_names_and_defaults():
    said = read()
    assert {name: getattr(said, name) for name in PUBLISHED_DEFAULTS} == PUBLISHED_DEFAULTS
    assert said.bn_bias_separately, "the one deliberate change: on unless switched off"


def test_every_field_is_a_flag_of_its_type():
    said = read(
        "--base-lr", "4", "--lr-decay", "10", "20", "--no-bn-bias-separately", "--fp16-allreduce",
        "--effective-batch-size", "1024", "--warmup-epochs", "0.3125", "--run-name", "x",
    )  # fmt: skip
    assert (said.base_lr, said.lr_decay, said.bn_bias_separately) == (4.0, (10, 20), False)
    assert (said.fp16_allreduce, said.effective_batch_size) == (True, 1024)
    assert (said.warmup_epochs, said.run_name) == (0.3125, "x")


def test_a_recipe_has_comments_and_what_follows_it_wins(tmp_path):
    recipe = tmp_path / "a recipe.args"
    recipe.write_text(
        "# 8192 samples\n--base-op lars  # by layers\n\n--base-lr 16 --wd 1e-4\n--run-name 'a-b'\n"
    )
    said = read(f"@{recipe}", "--base-lr", "8")
    assert (said.base_op, said.base_lr, said.wd, said.run_name) == ("lars", 8.0, 1e-4, "a-b")


@pytest.mark.parametrize(
    ("argv", "flag", "fix"),
    [
        (["--base-op", "larz"], "--base-op", "'lars'"),
        (["--lr-scaling", "sqr"], "--lr-scaling", "'sqrt'"),
        (["--batch-size", "0"], "--batch-size", "at least 1"),
        (["--momentum", "1"], "--momentum", "below 1"),
        (["--epochs", "-1"], "--epochs", "at least 1"),
        (["--label-smoothing", "1.5"], "--label-smoothing", "below 1"),
        (["--base-lr", "nan"], "--base-lr", "at least 0"),
        (["--checkpoint-format", "last.pth"], "--checkpoint-format", "{epoch}"),
        (["--checkpoint-format", ".tmp-{epoch}"], "--checkpoint-format", "no dot before"),
        (["--run-name", "../x"], "--run-name", "folder name"),
        (["--bath-size", "3"], "--bath-size", "unrecognized"),
        (["--batch", "3"], "--batch", "unrecognized"),
        (["@no-such-recipe.args"], "no-such-recipe.args", "No such file"),
    ],
)
def test_wrong_flags_are_refused_in_their_own_name(argv, flag, fix, capsys):
    with pytest.raises(SystemExit) as stop:
        read(*argv)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert flag in message
    assert fix in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"--wd 1e-4\n--run-name 'a\n", "a.args, line 2: No closing quotation"),
        (b"--wd 1e-4\n--run-name \xff\n", "a.args, line 2: 'utf-8' codec can't decode byte 0xff"),
        (b"# the rest\n@other.args\n", "@other.args cannot be read: No such file or directory"),
        (None, "a.args cannot be read: Is a directory"),
    ],
)
def test_a_damaged_recipe_is_refused_with_its_line(tmp_path, capsys, content, told):
    recipe = tmp_path / "a.args"
    if content is None:
        recipe.mkdir()
    else:
        recipe.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        read(f"@{recipe}")
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "one.args").write_bytes(b"\xef\xbb\xbf--wd 2\n")
    assert read(f"@{tmp_path}/one.args").wd == 2.0


def test_a_recipe_that_includes_itself_is_refused(tmp_path, capsys):
    one, other = tmp_path / "one.args", tmp_path / "other.args"
    one.write_text(f"@{other}\n")
    other.write_text(f"@{one}\n")
    with pytest.raises(SystemExit, match="2"):
        read(f"@{one}")
    assert f"@{one} includes itself" in capsys.readouterr().err


def test_a_recipe_may_hold_a_recipe(tmp_path):
    (tmp_path / "one.args").write_text(f"@{tmp_path}/two.args\n--wd 2\n")
    (tmp_path / "two.args").write_text("--wd 1 --base-lr 3\n")
    said = read(f"@{tmp_path}/one.args")
    assert (said.wd, said.base_lr) == (2.0, 3.0)


def test_help_is_told_by_one_rank(monkeypatch, capsys):
    for rank, told in (("1", False), ("0", True)):
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", rank)
        with pytest.raises(SystemExit) as stop:
            read("--help")
        assert stop.value.code == 0
        assert ("--base-lr" in capsys.readouterr().out) == told


def test_identity_leaves_out_what_may_change_between_two_starts_of_a_run():
    one = identity(read("--workers", "3", "--log-dir", "here", "--max-steps", "5"))
    assert one == identity(read())
    assert one != identity(read("--wd", "1e-4"))


def test_names_repeated_for_the_sake_of_speed_are_those_of_the_rooms():
    from lars import OPTIMIZERS, schedules
    from lars.names import LARS_FORMS as FORMS

    assert tuple(OPTIMIZERS) == config_room.OPTIMIZERS
    assert tuple(FORMS) == config_room.LARS_FORMS
    names = {name.removesuffix("_decay") for name in schedules.SCHEDULES}
    assert set(config_room.SCHEDULES) <= names


@pytest.mark.parametrize("script", ["train_imagenet.py", "train_imagenet_dali.py"])
def test_help_is_fast_and_teaches(script):
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = run(sys.executable, ROOT / script, "--help")
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 2
    assert done.returncode == 0
    for field in dataclasses.fields(Config):
        assert config_room.flag_name(field.name) in done.stdout
    assert "mpirun -np 8" in done.stdout
    heavy = run(sys.executable, "-X", "importtime", ROOT / script, "--help").stderr
    assert not {"torch", "torchvision", "horovod", "nvidia", "tensorboard", "numpy"} & {
        line.rsplit("|")[-1].strip() for line in heavy.splitlines()
    }


def test_usage_errors_are_value_errors_with_an_exit_code():
    assert UsageError("x").exit_code == 2
