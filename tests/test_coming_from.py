"""docs/coming-from.md: the flags of the other programs exist, and our commands and flags do what the page states."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from data.sources.imagenet import ImageNet, ImageNetDali
from lars.config import Config, parse
from lars.config.plan import Plan, make_plan
from lars.learner.build import schedule

PAGE = (ROOT / "docs/coming-from.md").read_text()
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
# The flags that the other programs define, from their source code.
OTHERS = {
    name: set(row["flags"].split())
    for name, row in json.loads((ROOT / "tests/goldens/other_trainers.json").read_text()).items()
}
SOURCES = {"train_imagenet.py": ImageNet, "train_imagenet_dali.py": ImageNetDali}
IMAGENET = 1_281_167

FLAG = re.compile(r"--?[a-z][\w*-]*")


def pairs(name: str) -> list[tuple[str, str]]:
    """The commands of a section: that of the other program and ours."""
    found = re.findall(
        r"^```\n# there\n(.*?)\n\n# here\n(.*?)\n```", SECTIONS[name], re.MULTILINE | re.DOTALL
    )
    return [(there.replace("\\\n", ""), here.replace("\\\n", "")) for there, here in found]


def rows(name: str) -> Iterator[tuple[list[str], list[str]]]:
    """The code in the first two cells of each row of the tables of a section."""
    for there, here in re.findall(r"^\| (.+?) \|(.*?)\|", SECTIONS[name], re.MULTILINE):
        yield tuple(re.findall(r"`([^`]+)`", cell) for cell in (there, here))


def read(words: list[str], source: type = ImageNet) -> tuple[Config, Any]:
    return parse(words, Config, source, description="")


def planned(command: str) -> tuple[Config, Plan]:
    """The flags and the plan of one of our commands, on the number of ranks that it states."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word in SOURCES)
    config, _ = read(words[at + 1 :], SOURCES[words[at]])
    ranks = re.search(r"(?:-np|--nproc-per-node) (\d+)", command)
    size = int(ranks[1]) if ranks else 1
    return config, make_plan(config, size=size, train_size=IMAGENET)


def test_there_is_a_section_for_each_program():
    assert list(SECTIONS) == ["What differs from all of them", *OTHERS]
    assert all(pairs(name) for name in OTHERS)


@pytest.mark.parametrize("name", OTHERS)
def test_the_page_names_every_flag_of_the_other_program_and_no_other(name):
    words = {word for there, _ in rows(name) for code in there for word in code.split()}
    named = {word for word in words if FLAG.fullmatch(word)}
    # The script is the last word with .py. Words before it belong to the launcher.
    commands = [there.rpartition(".py ")[2] for there, _ in pairs(name)]
    typed = {word.partition("=")[0] for command in commands for word in command.split()}
    typed = {word for word in typed if FLAG.fullmatch(word)}
    unknown = {f for f in named | typed if not any(fnmatchcase(flag, f) for flag in OTHERS[name])}
    assert not unknown, f"{name} has no such flags"
    missing = {flag for flag in OTHERS[name] if not any(fnmatchcase(flag, f) for f in named)}
    assert not missing, f"the section on {name} does not say what becomes of these flags"


@pytest.mark.parametrize("name", OTHERS)
def test_our_flags_can_be_typed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("--wd 1e-4\n")  # @FILE
    for _, here in rows(name):
        for code in here:
            if code.startswith(("--", "@")):
                dali = "--reader" in code
                config, _ = read(shlex.split(code), ImageNetDali if dali else ImageNet)
                assert not config.ignored_by_the_schedule(), code


# Samples per step, epochs and epochs of warm-up of each pair of commands. Then the epochs at which the learning rates
# are compared, and these rates, as the code of the other program computes them.
CHECKED = {
    "pytorch/examples": [(256, 90, 0, {0: 0.1, 29: 0.1, 30: 0.01, 60: 0.001, 89: 0.001}), None],
    "torchvision's references": [
        (256, 90, 0, {0: 0.1, 29: 0.1, 30: 0.01, 60: 0.001, 89: 0.001}),
        (1024, 600, 5, {5: 0.5, 302.5: 0.25, 600: 0}),
    ],
    "timm": [(1024, 100, 5, {5: 0.5, 52.5: 0.25}), (2048, 300, 5, {5: 5e-3})],
    "Horovod's example": [
        (256, 90, 5, {0: 0.0125, 2.5: 0.0125 * 4.5, 5: 0.1, 30: 0.01, 60: 1e-3, 80: 1e-4})
    ],
    "NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch": [
        (1024, 90, 0.3125, {0: 0, 0.3125: 5.6568542494924, 90: 0}),
        (1024, 90, 0.3125, {0: 0, 0.3125: 5.6568542494924, 90: 0}),
    ],
    "DALI's example": [(2048, 90, 5, {0: 0, 5: 0.8, 30: 0.08, 60: 8e-3, 80: 8e-4})],
}


@pytest.mark.parametrize("name", OTHERS)
def test_our_commands_have_the_batch_size_and_the_learning_rate_of_the_others(name):
    for (_, here), checked in zip(pairs(name), CHECKED[name], strict=True):
        config, plan = planned(here)
        assert not config.ignored_by_the_schedule()
        if checked is None:
            assert config.evaluate
            continue
        effective, epochs, warmup, rates = checked
        assert plan.effective_batch_size == effective
        assert (config.epochs, config.warmup_epochs) == (epochs, warmup)
        lr = schedule(config, plan)
        for epoch, rate in rates.items():
            step = epoch * plan.steps_per_epoch
            assert lr(round(step)) == pytest.approx(rate, rel=2e-3, abs=1e-6), (here, epoch)
