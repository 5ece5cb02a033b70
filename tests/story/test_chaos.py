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


@pytest.mark.parametrize(("engine", "attacks"), [("horovod", 7), ("torch", 3)])
def test_attacked_runs_end_with_the_same_bytes(engine, attacks):
    """A few attacks on runs of 2 ranks. Most attacks send SIGKILL to a rank or to the launcher."""
    summary = chaos.main(["--attacks", str(attacks), "--seed", "5", "--backend", engine])
    assert summary["runs that ended with the clean run's bytes"] >= 1
    assert sum(summary.get(name, 0) for name in chaos.ATTACKS) == attacks
    in_time = [summary.get(f"exit code {code}", 0) for code in (75, 137)]
    assert sum(in_time) >= attacks / 2, "most came in time"


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
@pytest.mark.parametrize("engine", ["horovod", "torch"])
def test_three_minutes_on_two_to_four_ranks(engine):
    ranks = ["--ranks", "2", "3", "4"]
    summary = chaos.main(["--minutes", "3", *ranks, "--seed", "1", "--backend", engine])
    assert summary["runs that ended with the clean run's bytes"] >= 1
