"""docs/optimizers.md: its examples run, and its tables list every form and name."""

import re
from typing import Any

import torch

from conftest import ROOT
from lars import OPTIMIZERS, schedules
from lars.names import LAMB_FORMS, LARS_FORMS

PAGE = (ROOT / "docs" / "optimizers.md").read_text()


def test_the_examples_run_one_after_the_other() -> None:
    torch.manual_seed(0)
    examples = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 9
    names: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, "docs/optimizers.md", "exec"), names)
        optimizer = names["optimizer"]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            names["model"](names["images"]), names["labels"]
        ).backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in names["model"].parameters())


def test_the_tables_list_every_form_and_name() -> None:
    section = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
    for title, forms in (("LARS", LARS_FORMS), ("LAMB", LAMB_FORMS)):
        assert re.findall(r"^\| `([\w-]+)`", section[title], re.MULTILINE) == list(forms)
    assert all(f"`{name}`" in section["By name"] for name in OPTIMIZERS)
    assert all(f"`{name}`" in section["Schedules"] for name in schedules.SCHEDULES)
