"""Training under random attacks ends with the same bytes as an undisturbed run; see chaos.py."""

from __future__ import annotations

import json
import shutil

import chaos
import pytest

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun on the PATH"),
]


def test_twenty_kills_and_other_attacks():
    """20 attacks on runs of 2 ranks. Most attacks send SIGKILL to a rank or to the launcher."""
    summary = chaos.main(["--attacks", "20", "--seed", "5"])
    assert summary["runs that ended with the clean run's bytes"] >= 1
    assert sum(summary.get(name, 0) for name in chaos.ATTACKS) == 20
    assert summary["exit code 137"] + summary["exit code 75"] >= 10, "most came in time"


def test_attacks_on_runs_of_torchrun():
    """The launcher changes what a kill or a signal does. Few attacks show it, and the others are the trainer's."""
    summary = chaos.main(["--attacks", "5", "--seed", "5", "--backend", "torch"])
    assert summary["runs that ended with the clean run's bytes"] >= 1


def test_the_summary_contains_a_failure(tmp_path, monkeypatch):
    def fail(self, ranks, more):
        self.counts["kill a rank"] += 1
        raise AssertionError("exit code 9, not one of {0}")

    monkeypatch.setattr(chaos.Chaos, "run", fail)
    with pytest.raises(AssertionError):
        chaos.main(["--attacks", "2", "--summary", str(tmp_path / "chaos.json")])
    summary = json.loads((tmp_path / "chaos.json").read_text())
    assert summary["failure"] == "AssertionError: exit code 9, not one of {0}"
    assert summary["kill a rank"] == 1


@pytest.mark.soak
def test_two_hundred_kills():
    summary = chaos.main(["--attacks", "200", "--only", "kill"])
    assert summary["exit code 137"] >= 100


@pytest.mark.soak
def test_three_minutes_on_two_to_four_ranks():
    summary = chaos.main(["--minutes", "3", "--ranks", "2", "3", "4", "--seed", "1"])
    assert summary["runs that ended with the clean run's bytes"] >= 1
