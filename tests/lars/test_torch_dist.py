"""The world of torch.distributed without other ranks: who waits, and who reports an error."""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lars.comm import torch_dist
from lars.comm.torch_dist import TorchWorld


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    return TorchWorld(1, dist.HashStore())


def test_only_the_first_rank_reports(world):
    assert world.reports_first()
    assert not world.reports_first()


def test_a_rank_reports_if_the_process_with_the_store_does_not_answer(world, monkeypatch):
    """The timeout of a TCPStore does not apply to `add`."""
    monkeypatch.setattr(torch_dist, "_ANSWER_SECONDS", 0.1)
    waiting = threading.Event()
    world.store = SimpleNamespace(add=lambda key, number: waiting.wait(60))
    began = time.monotonic()
    assert world.reports_first()
    assert time.monotonic() - began < 30
    waiting.set()


def test_a_rank_whose_gpu_sums_gradients_waits_for_the_others(world, monkeypatch):
    """The host waits in the code of the step, not in torch.distributed."""
    is_done = False
    work = SimpleNamespace(is_completed=lambda: is_done)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, async_op: work)
    here = sys._getframe()
    assert not world.is_waiting(here)
    assert world.start_sum(torch.zeros(1), "gradients.0") is work
    assert world.is_waiting(here)
    is_done = True
    assert not world.is_waiting(here)


@pytest.mark.parametrize(
    ("message", "is_lost"),
    [
        ("[pair.cc:553] Connection closed by peer [10.0.0.2]:1234", True),
        ("Application timeout caused pair closure", True),
        ("SystemError: connect: No route to host", True),
        ("CUDA out of memory", False),
    ],
)
def test_errors_of_a_lost_peer(world, message, is_lost):
    assert world.is_lost_peer(RuntimeError(message)) == is_lost


@pytest.mark.parametrize(
    ("message", "is_lost"),
    [
        ("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting", True),
        ("ncclSystemError: System call (e.g. socket, malloc) or external library call failed", True),
        ("Watchdog caught collective operation timeout", True),
        ("ncclInvalidUsage: This usually reflects invalid usage. Duplicate GPU detected : rank 1", False),
        ("ncclUnhandledCudaError: Call to CUDA function failed. Last error: Cuda failure 2 'out of memory'", False),
    ],
)  # fmt: skip
def test_errors_of_nccl(world, message, is_lost):
    assert world.is_lost_peer(dist.DistBackendError(message)) == is_lost
    assert not world.is_lost_peer(ValueError("Connection closed by peer"))
