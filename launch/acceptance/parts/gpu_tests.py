"""The tests of this repository that need a GPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from launch.acceptance.budget import Budget
from launch.acceptance.rows import OK, Row, failed, not_tested

_ROOT = Path(__file__).parents[3]
_WHAT, _MARK = "pytest -m gpu", "pytest.mark.gpu"


def run(budget: Budget) -> Iterator[Row]:
    """Run pytest on the tests with the marker gpu."""
    if not torch.cuda.is_available():
        yield not_tested(_WHAT, "there is no GPU")
    elif not importlib.util.find_spec("pytest"):
        yield not_tested(_WHAT, "pytest is not installed; ./launch/setup.sh --dev")
    else:
        files = [str(p) for p in sorted(_ROOT.glob("tests/**/test_*.py")) if _MARK in p.read_text()]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-q",
            "-p",
            "no:cacheprovider",
            *files,
        ]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr, flush=True)
        yield row_of(done.returncode, done.stdout)


def row_of(code: int, output: str) -> Row:
    """Judge pytest by its exit code and its last line."""
    last = output.strip().split("\n")[-1].strip("= ")
    if code == 0:
        return Row(_WHAT, OK, note=last)
    names = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return failed(_WHAT, ", ".join([last, *names[:5]]))
