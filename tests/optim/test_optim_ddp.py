"""The optimizers on two ranks with torch's own data parallelism and its distributed state."""

import json
from typing import Any

import pytest

from conftest import ROOT, ranks_of


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What two ranks found; see tests/ranks/ddp.py."""
    done = ranks_of("torch")(2, ROOT / "tests" / "ranks" / "ddp.py", timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_two_ranks_step_like_one_on_all_samples(report: dict[str, Any]) -> None:
    assert len(report["ddp"]) == 8
    assert {name: error for name, error in report["ddp"].items() if error > 1e-6} == {}


def test_a_state_from_torchs_distributed_helpers_continues_exactly(report: dict[str, Any]) -> None:
    """get_optimizer_state_dict and set_optimizer_state_dict, which name the parameters."""
    assert len(report["state"]) == 8
    assert {name: error for name, error in report["state"].items() if error} == {}
