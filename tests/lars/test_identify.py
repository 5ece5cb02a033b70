"""`python -m lars.identify`: published rules are recognized, and mistakes are distinguished."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lars.identify.__main__ import main
from lars.names import LAMB_FORMS, LARS_FORMS

Run = tuple[int, dict[str, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command with --json; returns the exit code and the report."""

    def call(*words: str) -> Run:
        code = main([*words, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command, which must refuse its arguments; returns the message."""

    def call(*words: str) -> str:
        assert main(words) == 2
        shown = capsys.readouterr()
        assert not shown.out
        return shown.err

    return call


@pytest.mark.parametrize("form", LARS_FORMS)
def test_every_form_of_lars_is_recognized(form: str, run: Any) -> None:
    code, found = run("lars:LARS", "--option", f"form={form}", "--option", "eps=1e-6")
    assert (code, found["rule"], found["lr_zero"]) == (0, f"lars {form}", "")
    assert found["digits"] >= 12
    assert found["hyper_parameters"]["eps"] == 1e-6
    # The measured properties name the options of the form.
    properties, options = found["properties"], LARS_FORMS[form]
    joined = options.get("denominator", "split")
    words = {
        "split": "weight_decay ‖w‖ +",
        "joint": "‖g + weight_decay",
        "momentum": "momentum ‖w‖",
    }
    assert words[joined] in properties["denominator"]
    inside = {"none": "nothing", "ratio": "the ratio;", "both": "lr and ratio"}
    assert inside[options.get("inside", "none")] in properties["inside the momentum buffer"]
    assert properties["first step at lr 0"] == "harmless"


@pytest.mark.parametrize("form", LAMB_FORMS)
def test_every_form_of_lamb_is_recognized(form: str, run: Any) -> None:
    code, found = run("lars:LAMB", "--option", f"form={form}")
    assert (code, found["rule"]) == (0, f"lamb {form}")


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["torch.optim:SGD", "--option", "nesterov=True"], "sgd"),
        (["torch.optim:AdamW"], "adamw"),
        (["torch.optim:RMSprop"], "rmsprop"),
        (["lars:TVLARS", "--option", "lmbda=0.01"], "tvlars"),
        (["lars:LARSWrapper"], "lars torchlars"),
        (["lars:LARSWrapper", "--wraps", "torch.optim:Adam"], "wrapper around Adam"),
        (["optimizer_stand_ins:AlteredLars"], "lars nus"),
        (["optimizer_stand_ins:WrappingLARC", "--option", "clip=False"], "lars larc"),
    ],
)
def test_other_rules_are_recognized(words: list[str], rule: str, run: Any) -> None:
    code, found = run(*words)
    assert (code, found["rule"], found["digits"] > 12) == (0, rule, True)


def test_larc_puts_an_unscaled_gradient_into_the_buffer_at_lr_zero(run: Any) -> None:
    code, found = run("optimizer_stand_ins:WrappingLARC", "--option", "trust_coef=0.001")
    assert (code, found["rule"]) == (0, "lars larc")
    assert found["hyper_parameters"]["trust_coefficient"] == 0.001
    assert found["lr_zero"].startswith("puts a gradient ")
    assert found["properties"]["p.grad"] == "overwritten by the step"


# For each mistake: the first step and tensor that differ from NUS, and the property that names it.
MISTAKES = {
    "no ratio clamp": (2, "tiny_gradient.weight", "bound of the ratio", "none"),
    "ratio clamp 10": (2, "tiny_gradient.weight", "bound of the ratio", "10"),
    "no element clamp": (5, "spike.weight", "bound of elements", "none"),
    "element clamp on the raw gradient": (5, "spike.weight", "bound of elements", "10, before"),
    "no eps": (2, "conv.weight", "eps", "its option is 1e-05, and the first step uses 0"),
    "flag ignored": (2, "excluded.weight", None, None),
    "ratio inside": (2, "conv.weight", "inside the momentum buffer", "the ratio;"),
    "lr and ratio inside": (2, "conv.weight", "inside the momentum buffer", "lr and ratio"),
    "ratio 0 for zero norms": (2, "zero.weight", "zero weight", "does not move"),
    "zero gradient adapted": (2, "no_gradient.weight", "zero gradient", "decays with the ratio"),
    "norm of the decayed gradient": (2, "conv.weight", "trust ratio", "no form has"),
    "dampened first step": (2, "conv.weight", "first step", "0.1 times"),
    "nesterov": (2, "conv.weight", "Nesterov", "yes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_distinguished_from_the_published_rule(mistake: str, run: Any) -> None:
    step, tensor, name, words = MISTAKES[mistake]
    code, found = run("optimizer_stand_ins:AlteredLars", "--option", f"mistake={mistake}")
    assert code == 1
    (nus,) = [row for row in found["rules"] if row["rule"] == "lars nus"]
    assert (nus["first_difference"]["step"], nus["first_difference"]["tensor"]) == (step, tensor)
    if name is not None:
        assert found["properties"][name].startswith(words) or words in found["properties"][name]
        _, right = run("optimizer_stand_ins:AlteredLars")
        assert right["properties"].get(name) != found["properties"][name]


def test_weight_decay_of_an_excluded_group_is_reported(run: Any) -> None:
    _, right = run("optimizer_stand_ins:AlteredLars")
    _, found = run("optimizer_stand_ins:AlteredLars", "--option", "mistake=decay in every group")
    assert right["exclusions"] == [
        "groups with an exclusion flag have no trust ratio and no weight decay"
    ]
    assert found["exclusions"] == ["groups with an exclusion flag have no trust ratio"]


def test_a_mixture_of_forms_is_described_by_its_options(run: Any) -> None:
    _, found = run("optimizer_stand_ins:AlteredLars", "--option", "mistake=ratio inside")
    assert "inside='ratio'" in found["same_as"]
    assert "max_ratio=50.0" in found["same_as"]
    code, found = run("lars:LAMB", "--option", "form=apex", "--option", "max_weight_norm=5.0")
    assert (code, found["rule"], found["same_as"]) == (1, "lamb apex", None)
    assert found["rules"][0]["first_difference"]["tensor"] == "large.weight"


def test_a_class_in_the_current_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("import torch\n\n\nclass Mine(torch.optim.SGD):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert main(["mine:Mine"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("mine:Mine equals sgd: all moves agree to 16 digits (up to rounding).")
    assert len(shown.splitlines()) < 40
    assert "SGD(momentum=0.9" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["torch.optim"], "write package.module:Name"),
        (["no_such_module:Lars"], "start the command in the folder of the module"),
        (["torch.optim:SDG"], "has no SDG; did you mean torch.optim:SGD?"),
        (["torch.nn:Linear"], "is not an optimizer"),
        (["optimizer_stand_ins:NeedsMore"], "add --option horizon=VALUE"),
        (["optimizer_stand_ins:StepNeedsMore"], "its step() failed: TypeError"),
        (["torch.optim:SGD", "--option", "speed=3"], "has no option speed; it has"),
        (["torch.optim:SGD", "--option", "momentum"], "write NAME=VALUE"),
        (["torch.optim:SGD", "--option", "momentum=-1"], "cannot be created: ValueError"),
        (["torch.optim:SGD", "--wraps", "torch.optim:SGD"], "leave --wraps out"),
        (["lars:LARSWrapper", "--wraps", "torch.optim:Linear"], "--wraps torch.optim:Linear"),
    ],
)
def test_bad_input_is_refused_with_the_fix(words: list[str], message: str, refused: Any) -> None:
    assert message in refused(*words)


def test_an_exception_at_lr_zero_is_reported(run: Any) -> None:
    code, found = run("optimizer_stand_ins:FailsAtZero")
    assert (code, found["rule"]) == (1, "sgd")
    assert found["lr_zero"].startswith("raises ZeroDivisionError")


# Classes of packages, with the rule that they equal, or the nearest rule and the first tensor that differs.
PACKAGES = [
    ("timm.optim:Lars", [], "lars torchlars", None),
    ("timm.optim:Lars", ["trust_clip=True"], "lars torchlars", None),
    ("timm.optim:Lamb", [], "lamb apex", None),
    ("lightly.utils.lars:LARS", [], "lars larc, trust_clip=False", None),
    ("torch_optimizer:LARS", [], "lars larc, trust_clip=False", None),
    ("torch_optimizer:Lamb", [], "lamb tvlars", None),
    ("pytorch_optimizer:LARS", [], "lars larc, trust_clip=False", "no_gradient.weight"),
]


@pytest.mark.parametrize(("path", "options", "rule", "tensor"), PACKAGES)
def test_classes_of_packages(
    path: str, options: list[str], rule: str, tensor: str | None, run: Any
) -> None:
    package = path.split(".")[0].split(":")[0]
    pytest.importorskip(package, reason=f"{package} is not installed")
    words = [word for option in options for word in ("--option", option)]
    code, found = run(path, *words)
    first = found["rules"][0]["first_difference"]
    assert (code, found["rule"]) == (0 if tensor is None else 1, rule)
    assert (first and first["tensor"]) == tensor
