"""Broadcasting a checkpoint of any size to all ranks."""

from __future__ import annotations

import pytest
import torch

from conftest import ROOT
from lars.comm.state import _mapped, broadcast_state
from lars.comm.world import World


@pytest.mark.mpi
def test_a_tree_of_tensors_reaches_every_rank_in_chunks(mpirun):
    done = mpirun(2, ROOT / "tests" / "ranks" / "broadcast.py")
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("RANK")) == [
        "RANK 0 True",
        "RANK 1 True",
    ]


def test_the_versions_of_modules_travel_with_a_state_dict():
    state = torch.nn.BatchNorm2d(3).state_dict()
    copied = _mapped(state, torch.Tensor, lambda tensor: tensor)
    assert copied._metadata == state._metadata


def test_a_single_process_gets_the_same_object():
    state = {"a": [1, 2]}
    assert broadcast_state(state, World()) is state
