"""Broadcasting a checkpoint of any size to all ranks."""

from __future__ import annotations

import pytest

from conftest import ROOT
from lars.comm.state import broadcast_state
from lars.comm.world import World


@pytest.mark.mpi
def test_a_tree_of_tensors_reaches_every_rank_in_chunks(mpirun):
    done = mpirun(2, ROOT / "tests" / "ranks" / "broadcast.py")
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("RANK")) == [
        "RANK 0 True",
        "RANK 1 True",
    ]


def test_a_single_process_gets_the_same_object():
    state = {"a": [1, 2]}
    assert broadcast_state(state, World()) is state
