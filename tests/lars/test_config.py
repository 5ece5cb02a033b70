"""Flags: names and defaults of the published trainer, errors that name the flag, recipes."""

from __future__ import annotations

import dataclasses
import sys
import time

import pytest

from conftest import ROOT, run
from lars.config import Config, UsageError, parse
from lars.config.flags import flag_name
from lars.run.identity import same_run

# The default of epsilon depends on the form; it is 1e-5 for the published trainer's form.
PUBLISHED_DEFAULTS = {
    "log_dir": "./logs/imagenet", "checkpoint_format": "checkpoint-{epoch}.pth.tar", "fp16_allreduce": False,
    "batches_per_allreduce": 1, "model": "resnet50", "batch_size": 32, "val_batch_size": 32, "epochs": 90,
    "base_lr": 0.0125, "lr_decay": (30, 60, 80), "warmup_epochs": 5.0, "momentum": 0.9, "wd": 5e-5,
    "epsilon": None, "label_smoothing": 0.1, "base_op": "sgd", "lr_scaling": "keep", "no_cuda": False,
    "single_threaded": False, "seed": 42,
}  # fmt: skip


def read(*argv: str) -> Config:
    return parse(argv, Config, description="")[0]


def test_two_types_for_the_exchange_cannot_be_used_together():
    with pytest.raises(UsageError, match="--fp16-allreduce and --bf16-allreduce cannot"):
        Config(fp16_allreduce=True, bf16_allreduce=True)


def test_the_published_flags_keep_their_names_and_defaults():
    config = read()
    assert {name: getattr(config, name) for name in PUBLISHED_DEFAULTS} == PUBLISHED_DEFAULTS
    assert config.bn_bias_separately, "the only deliberate difference: on by default"


def test_every_field_is_a_flag_of_its_type():
    config = read(
        "--base-lr", "4", "--lr-decay", "10", "20", "--no-bn-bias-separately", "--fp16-allreduce",
        "--effective-batch-size", "1024", "--warmup-epochs", "0.3125", "--run-name", "x",
    )  # fmt: skip
    assert (config.base_lr, config.lr_decay, config.bn_bias_separately) == (4.0, (10, 20), False)
    assert (config.fp16_allreduce, config.effective_batch_size) == (True, 1024)
    assert (config.warmup_epochs, config.run_name) == (0.3125, "x")


def test_a_recipe_may_have_comments_and_later_flags_override_it(tmp_path):
    recipe = tmp_path / "a recipe.args"
    recipe.write_text(
        "# 8192 samples\n--base-op lars  # by layers\n\n--base-lr 16 --wd 1e-4\n--run-name 'a-b'\n"
    )
    config = read(f"@{recipe}", "--base-lr", "8")
    assert (config.base_op, config.base_lr) == ("lars", 8.0)
    assert (config.wd, config.run_name) == (1e-4, "a-b")


@pytest.mark.parametrize(
    ("argv", "flag", "fix"),
    [
        (["--base-op", "larz"], "--base-op", "did you mean lars?"),
        (["--base-op", "torch.optim.Muon"], "--base-op", "package.module:Class"),
        (["--optimizer-options", "a=1"], "--optimizer-options", "belongs to package.module:Class"),
        (["--base-op", "a:B", "--optimizer-options", "ab"], "--optimizer-options", "name=value"),
        (["--base-op", "a:B", "--optimizer-options", "a=b"], "--optimizer-options", "literal"),
        (["--base-op", "a:B", "--optimizer-options", "a=1", "a=2"], "a is given twice", "leave"),
        (["--base-op", "a:B", "--lars-form", "nus"], "--lars-form", "belongs to lars"),
        (["--lr-scaling", "sqr"], "--lr-scaling", "'sqrt'"),
        (["--batch-size", "0"], "--batch-size", "at least 1"),
        (["--momentum", "1"], "--momentum", "below 1"),
        (["--epochs", "-1"], "--epochs", "at least 1"),
        (["--label-smoothing", "1.5"], "--label-smoothing", "below 1"),
        (["--base-lr", "nan"], "--base-lr", "at least 0"),
        (["--checkpoint-format", "last.pth"], "--checkpoint-format", "{epoch}"),
        (["--checkpoint-format", ".tmp-{epoch}"], "--checkpoint-format", "not begin with a dot"),
        (["--run-name", "../x"], "--run-name", "folder name"),
        (["--base-op", "adam", "--betas", "0.9", "1"], "--betas", "below 1"),
        (["--base-op", "tvlars", "--alpha", "0"], "--alpha", "more than 0"),
        (["--base-op", "tvlars", "--nesterov"], "--nesterov", "belongs to sgd, lars"),
        (["--base-op", "sgd", "--betas", "0.9", "0.99"], "--betas", "belongs to lamb, adam, adamw"),
        (["--base-op", "lars", "--lamb-form", "nus"], "--lamb-form", "belongs to lamb"),
        (["--loss", "mse"], "--loss", "'bce'"),
        (["--mixup", "-1"], "--mixup", "at least 0"),
        (["--cutmix", "nan"], "--cutmix", "at least 0"),
        (["--mixup", "1e9"], "--mixup", "below 1000"),
        (["--cutmix", "1", "--batch-size", "1"], "--cutmix", "a larger --batch-size"),
        (["--bce-sum"], "--bce-sum", "add --loss bce"),
        (["--bce-target-threshold", "0.2"], "--bce-target-threshold", "add --loss bce"),
        (["--loss", "bce", "--bce-target-threshold", "1"], "--bce-target-threshold", "below 1"),
        (["--loss", "bce", "--bce-target-threshold", "0.9"], "--label-smoothing 0.1", "would be 0"),
        (["--nesterov", "--momentum", "0"], "--nesterov", "--momentum above 0"),
        (["--evaluate", ""], "--evaluate", "the value is empty"),
        (["--observer", "a:B", ""], "--observer", "the value is empty"),
        (["--bath-size", "3"], "--bath-size", "did you mean --batch-size?"),
        (["--trian-dir", "3"], "--trian-dir", "is not a flag"),
        (["--batch", "3"], "--batch", "is not a flag"),
        (["--compile", "true"], "true", "--no-flag"),
        (["launch/recipes/digits_lars_1024.args"], "1024.args", "did you mean @launch/recipes"),
        (["@no-such-recipe.args"], "no-such-recipe.args", "No such file"),
    ],
)
def test_flag_errors_name_the_flag_and_the_fix(argv, flag, fix, capsys):
    with pytest.raises(SystemExit) as stop:
        read(*argv)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert flag in message
    assert fix in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"--wd 1e-4\n--run-name 'a\n", "a.args, line 2: No closing quotation"),
        (b"--wd 1e-4\n--run-name \xff\n", "a.args, line 2: 'utf-8' codec can't decode byte 0xff"),
        (
            b"--wd 1\n\n--base-rl 8\n",
            "a.args, line 3: --base-rl is not a flag; did you mean --base-lr?",
        ),
        (b"# the rest\n@other.args\n", "@other.args cannot be read: No such file or directory"),
        (None, "a.args cannot be read: Is a directory"),
    ],
)
def test_an_error_in_a_recipe_names_its_line(tmp_path, capsys, content, message):
    recipe = tmp_path / "a.args"
    if content is None:
        recipe.mkdir()
    else:
        recipe.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        read(f"@{recipe}")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


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


def test_a_recipe_may_include_a_recipe(tmp_path):
    (tmp_path / "one.args").write_text(f"@{tmp_path}/two.args\n--wd 2\n")
    (tmp_path / "two.args").write_text("--wd 1 --base-lr 3\n")
    config = read(f"@{tmp_path}/one.args")
    assert (config.wd, config.base_lr) == (2.0, 3.0)


def test_only_one_rank_prints_help(monkeypatch, capsys):
    for rank, printed in (("1", False), ("0", True)):
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", rank)
        with pytest.raises(SystemExit) as stop:
            read("--help")
        assert stop.value.code == 0
        assert ("--base-lr" in capsys.readouterr().out) == printed


@dataclasses.dataclass(frozen=True)
class Source:
    train_size, fingerprint = 33, "ab-cd"


def test_the_identity_of_a_run_leaves_out_flags_that_may_change_on_resume():
    one = same_run(read("--workers", "3", "--log-dir", "here", "--max-steps", "5"), Source())
    assert one == same_run(read(), Source())
    assert one != same_run(read("--wd", "1e-4"), Source())


def test_common_spellings_are_accepted_as_aliases():
    config = read(
        "--optimizer", "lars", "--lr", "2", "--weight-decay", "1e-4", "--accumulation-steps", "8"
    )  # fmt: skip
    assert (config.base_op, config.base_lr, config.wd) == ("lars", 2.0, 1e-4)
    assert config.batches_per_allreduce == 8


def test_help_shows_a_default_of_zero(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    help_text = " ".join(capsys.readouterr().out.split())
    assert "or of ramp (default: 0.0)" in help_text


def test_a_flag_error_is_one_line(capsys):
    with pytest.raises(SystemExit):
        read("--bath-size", "3")
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("script", ["train_imagenet.py", "train_imagenet_dali.py"])
def test_help_is_fast_and_complete(script):
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = run(sys.executable, ROOT / script, "--help")
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 2
    assert done.returncode == 0
    for field in dataclasses.fields(Config):
        assert flag_name(field.name) in done.stdout
    assert "mpirun -np 8" in done.stdout
    heavy = run(sys.executable, "-X", "importtime", ROOT / script, "--help").stderr
    assert not {"torch", "torchvision", "horovod", "nvidia", "tensorboard", "numpy"} & {
        line.rsplit("|")[-1].strip() for line in heavy.splitlines()
    }


def test_usage_errors_are_value_errors_with_an_exit_code():
    assert UsageError("x").exit_code == 2
