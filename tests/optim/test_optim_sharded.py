"""Sharded parameters: the optimizers see whole layers, or refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks found; see tests/ranks/sharded.py."""
    meeting_point: Path = tmp_path_factory.mktemp("ranks") / "meeting_point"
    script = ROOT / "tests" / "ranks" / "sharded.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, script, meeting_point, str(rank)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    found: dict[str, Any] = json.loads(printed[0])
    return found


@pytest.mark.parametrize("how", ["fully_shard", "tensor parallel"])
def test_norms_are_those_of_whole_layers(report: dict[str, Any], how: str) -> None:
    assert len(report[how]) == 8
    assert {name: error for name, error in report[how].items() if error > 1e-5} == {}


def test_fully_sharded_data_parallel_is_refused(report: dict[str, Any]) -> None:
    """With flat parameters, and with use_orig_params, where each parameter is a flat shard."""
    assert len(report["refused"]) == 16
    for message in report["refused"]:
        assert "needs the norm of each layer, but FullyShardedDataParallel cuts layers" in message
        assert "use torch.distributed.fsdp.fully_shard" in message


def test_the_zero_optimizer_is_right_only_without_a_global_norm(report: dict[str, Any]) -> None:
    """Each rank clips by the norm of its own share, as the docstring of LAMB says."""
    assert report["zero"]["None"] < 1e-6
    assert report["zero"]["0.01"] > 1e-6
