"""torch.distributed: NCCL for GPUs, and Gloo for CPUs, objects and CPU tensors. It needs only torch.

Two properties of torch.distributed determine the design:

* Collectives have no names. Every rank must start the same collectives in the same order, which
  `lars.comm.gradients` ensures for its buckets.
* The ranks find each other through a store, a small server in rank 0's process. torchrun provides it. Under other
  launchers, `lars.comm.rendezvous` finds its address.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Mapping, MutableMapping
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lars import launcher
from lars.comm import rendezvous
from lars.comm.world import World
from lars.errors import LostPeerError

NAME = "torch.distributed"
INSTALL = "install a PyTorch that was built with it"
# The end of the error message if several tasks were started and each sees only itself.
ALONE = "gave no task a different rank"
# Launchers whose tasks this backend cannot join.
CANNOT_JOIN = ()
# Whether it finds the number of tasks by itself when the launcher does not state it.
COUNTS_TASKS = False
SUMS_BFLOAT16 = True

# No collective of a healthy job takes this long. Our watchdog reports a stalled rank earlier and in more detail.
_FOREVER = timedelta(days=30)

# The key in the store that counts the ranks which want to report an error.
_REPORTS = "reports of errors"

# How long the store may take to answer before an error is reported.
_ANSWER_SECONDS = 5.0

# Words in Gloo's errors after the connection to another rank has ended.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "timed out", "Timed out",
         "remote process exited", "Socket closed", "Failed to recv", "Application timeout caused pair closure",
         "No route to host", "Network is unreachable", "Connection refused")  # fmt: skip


# Words in NCCL's errors whose cause is this rank itself. NCCL's other errors may have a lost rank as their cause.
_OWN = ("ncclInvalidUsage", "ncclInvalidArgument", "out of memory")


class TorchWorld(World):
    """Several ranks that communicate through torch.distributed."""

    backend = NAME

    def __init__(self, local_rank: int, store: dist.Store) -> None:
        """Read rank and size from the process group, which has been initialised with `store`."""
        self.store = store
        self.newest: Any = None  # the gradient sum that was started last
        self.rank, self.size, self.local_rank = dist.get_rank(), dist.get_world_size(), local_rank

    def all_reduce(self, tensor: Tensor, name: str) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    def all_gather(self, tensor: Tensor, name: str) -> Tensor:
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor.contiguous())
        return torch.stack(gathered)

    def all_gather_object(self, value: Any, name: str) -> list[Any]:
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast_object(self, value: Any, name: str) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def broadcast(self, tensors: Mapping[str, Tensor]) -> None:
        for tensor in tensors.values():
            dist.broadcast(tensor, src=0)

    def start_sum(self, tensor: Tensor, name: str) -> Any:
        self.newest = dist.all_reduce(tensor, async_op=True)
        return self.newest

    def finish(self, handle: Any) -> None:
        handle.wait()  # on a GPU the stream waits, and the host goes on

    def is_lost_peer(self, error: BaseException) -> bool:
        return is_lost_peer(error)

    def is_waiting(self, frame: FrameType) -> bool:
        # On a GPU, the host waits for the device outside this backend, and the device waits for the other ranks.
        if self.newest is not None and not self.newest.is_completed():
            return True
        path = frame.f_code.co_filename
        return path == __file__ or f"{os.sep}torch{os.sep}distributed{os.sep}" in path

    def reports_first(self) -> bool:
        # The store may be in a process that has ended, that is stopped, or that cannot be reached. Its timeout does
        # not apply to this call, so a thread makes it. Without an answer, this rank reports.
        answers: list[int] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(self.store.add(_REPORTS, 1))

        thread = threading.Thread(target=ask, daemon=True, name="first report")
        thread.start()
        thread.join(_ANSWER_SECONDS)
        return answers in ([], [1])

    def leave(self, code: int) -> None:
        dist.destroy_process_group()
        World.abort(self, code)


def is_lost_peer(error: BaseException) -> bool:
    """Whether another rank that has ended, or a lost connection to it, caused the error."""
    message = str(error)
    if isinstance(error, dist.DistError):
        return not any(words in message for words in _OWN)
    return isinstance(error, RuntimeError) and any(words in message for words in _LOST)


# The world of this process. A second job in the same process uses it again, because the ranks could not
# distinguish the addresses of a second process group from those of the first, which remain in the store.
_joined: TorchWorld | None = None


def join(
    environment: MutableMapping[str, str] = os.environ,
    *,
    on_cpu: bool = False,
    stall_seconds: float = 0.0,
) -> World:
    """Initialise torch.distributed. If the launcher started a single task, return the single-process world.

    Args:
        environment: Environment of this process.
        on_cpu: Whether the gradients are on CPUs.
        stall_seconds: How long a rank may keep the others waiting; 0: no limit.

    Raises:
        ImportError: This torch was built without torch.distributed.
        UsageError: The ranks cannot find each other.
        LostPeerError: Another rank has ended, or it cannot be reached.
    """
    global _joined
    if not dist.is_available():
        raise ImportError("this torch was built without torch.distributed")
    place = launcher.place(environment)
    if place.size == 1:
        return World()
    if _joined is None:
        on_gpu = not on_cpu and torch.cuda.is_available() and dist.is_nccl_available()
        try:
            store = rendezvous.store(place, environment)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=store,
                rank=place.rank,
                world_size=place.size,
                timeout=timedelta(seconds=2 * stall_seconds) if stall_seconds else _FOREVER,
            )
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise LostPeerError(
                f"rank {place.rank} of {place.size} cannot connect to the other ranks ({error}); one of them has "
                "ended, or a firewall blocks the ports between the hosts"
            ) from error
        _joined = TorchWorld(place.local_rank, store)
        # Otherwise threads of the process group may abort the end of the process.
        atexit.register(_disconnect)
    return _joined


def _disconnect() -> None:
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
