"""The command ``lars-train``: train_imagenet.py for those who have installed the package and have no clone.

The wheel contains the script, its ``data`` folder and the recipes in a folder of this package, because pip would
silently overwrite an installed package named ``data`` with that of any other distribution. Only this command and the
processes that it starts import from there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys

from lars.config.recipes import HOME
from lars.errors import UsageError


def missing() -> list[str]:
    """Names of the packages of the extra ``train`` that are not installed."""
    requirements = importlib.metadata.requires("lars-imagenet") or []
    names = [re.split(r"[^\w.-]", text)[0] for text in requirements if 'extra == "train"' in text]
    return [name for name in names if not any(importlib.metadata.distributions(name=name))]


def train() -> None:
    """Run train_imagenet.py with the words of the command line."""
    absent = missing()
    if absent:
        print(
            f"lars-train: error: {', '.join(absent)}: not installed; run pip install 'lars-imagenet[train]'",
            file=sys.stderr,
        )
        sys.exit(UsageError.exit_code)
    sys.path.insert(0, str(HOME))
    importlib.import_module("train_imagenet").main()
