"""The world of torch.distributed without other ranks: who waits, and who reports an error."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lars.comm import torch_dist
from lars.comm.torch_dist import TorchWorld
from lars.errors import LostPeerError


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
    ("path", "is_waiting"),
    [("/torch/distributed/distributed_c10d.py", True), (torch_dist.__file__, True), ("/torch/nn/conv.py", False)],
)  # fmt: skip
def test_a_rank_that_is_in_a_collective_waits_for_the_others(world, path, is_waiting):
    names = {"sys": sys}
    exec(compile("frame = sys._getframe()", path, "exec"), names)
    assert world.is_waiting(names["frame"]) == is_waiting


def test_a_sum_is_waited_for(world):
    waited = []
    world.finish(SimpleNamespace(wait=lambda: waited.append(True)))
    assert waited


def test_a_rank_leaves_its_process_group_before_it_exits(world, monkeypatch):
    """Otherwise the threads of the group may change the exit code."""
    ended = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append("destroyed"))
    monkeypatch.setattr(os, "_exit", ended.append)
    world.leave(75)
    assert ended == ["destroyed", 75]


TASK = {
    "TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
}  # fmt: skip


def test_joining_states_the_place_of_a_rank_once(monkeypatch):
    """The second host of a job of two hosts with two ranks each."""
    started, at_exit = [], []
    monkeypatch.setattr(torch_dist, "_joined", None)
    monkeypatch.setattr(torch_dist.rendezvous, "store", lambda place, environment: dist.HashStore())
    monkeypatch.setattr(
        dist, "init_process_group", lambda kind, **options: started.append((kind, options))
    )
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch_dist.atexit, "register", at_exit.append)
    assert torch_dist.join(TASK | {"WORLD_SIZE": "1"}).size == 1
    assert not started
    worlds = [torch_dist.join(TASK, on_cpu=True, stall_seconds=60) for _ in range(2)]
    assert worlds[0] is worlds[1]
    assert (worlds[0].rank, worlds[0].size, worlds[0].local_rank) == (3, 4, 1)
    [(kind, options)] = started
    assert (kind, options["rank"], options["world_size"]) == ("gloo", 3, 4)
    assert options["timeout"].total_seconds() == 120, "the watchdog comes first"
    assert at_exit == [torch_dist._disconnect]


def test_a_rank_that_cannot_connect_to_the_others_has_lost_them(monkeypatch):
    """Another rank ended while the ranks connected. A wrong setting is not such a case."""

    def start(message):
        monkeypatch.setattr(torch_dist, "_joined", None)
        monkeypatch.setattr(torch_dist.rendezvous, "store", lambda *_: dist.HashStore())

        def connect(kind, **options):
            raise RuntimeError(message)

        monkeypatch.setattr(dist, "init_process_group", connect)
        torch_dist.join(TASK, on_cpu=True)

    with pytest.raises(
        LostPeerError, match=r"rank 3 of 4 cannot connect.*refused\); one of them has"
    ):
        start("Gloo connectFullMesh failed with timed out connecting: Connection refused")
    with pytest.raises(RuntimeError, match=r"^Unable to find address for: eth7$"):
        start("Unable to find address for: eth7")


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
