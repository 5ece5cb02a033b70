"""Training under attack ends with the bytes of a run that nobody disturbed; see chaos.py."""

from __future__ import annotations

import shutil

import chaos
import pytest

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun on the PATH"),
]


def test_twenty_kills_and_other_attacks():
    """20 attacks on runs of 2 ranks, most of them SIGKILL to a rank or to mpirun."""
    told = chaos.main(["--attacks", "20", "--seed", "5"])
    assert told["runs that ended with the clean run's bytes"] >= 1
    assert sum(told.get(name, 0) for name in chaos.ATTACKS) == 20
    assert told["exit code 137"] + told["exit code 75"] >= 10, "most came in time"


@pytest.mark.soak
def test_two_hundred_kills():
    told = chaos.main(["--attacks", "200", "--only", "kill"])
    assert told["exit code 137"] >= 100


@pytest.mark.soak
def test_three_minutes_on_two_to_four_ranks():
    told = chaos.main(["--minutes", "3", "--ranks", "2", "3", "4", "--seed", "1"])
    assert told["runs that ended with the clean run's bytes"] >= 1
