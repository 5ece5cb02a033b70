"""Horovod over MPI. No other module uses Horovod.

Three properties of Horovod 0.28.1 determine the design:

* Every collective has a name, because unnamed collectives may be paired wrongly.
* Optimizer state is not broadcast by Horovod, which takes a real optimizer step to create the state.
* `lars.comm.gradients` exchanges the gradients. Horovod's optimizer wrapper rejects channels-last gradients and
  rebuilds the optimizer.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, MutableMapping
from types import FrameType
from typing import Any

from torch import Tensor

from lars.comm.world import World, flush_output

NAME = "Horovod"
INSTALL = "run ./launch/setup.sh, or use --backend torch"
# The end of the error message if several tasks were started and each sees only itself.
ALONE = (
    "does not use Horovod's MPI; use launch/mpirun.sh, that MPI's own mpirun, or srun --mpi=pmix, or add "
    "--backend torch"
)
# Launchers that never use MPI.
CANNOT_JOIN = ("torchrun",)
# Whether it finds the number of tasks by itself when the launcher does not state it.
COUNTS_TASKS = True
SUMS_BFLOAT16 = False

_ABORT_SECONDS = 5.0


class HorovodWorld(World):
    """Several ranks that communicate through Horovod."""

    backend = NAME

    def __init__(self, hvd: Any) -> None:
        """Read rank and size from `hvd`, which is the initialised module horovod.torch."""
        self.hvd = hvd
        self.rank, self.size, self.local_rank = hvd.rank(), hvd.size(), hvd.local_rank()

    def all_reduce(self, tensor: Tensor, name: str) -> Tensor:
        return self.hvd.allreduce(tensor, op=self.hvd.Sum, name=name)

    def all_gather(self, tensor: Tensor, name: str) -> Tensor:
        return self.hvd.allgather(tensor[None].contiguous(), name=name)

    def all_gather_object(self, value: Any, name: str) -> list[Any]:
        return self.hvd.allgather_object(value, name=name)

    def broadcast_object(self, value: Any, name: str) -> Any:
        return self.hvd.broadcast_object(value, root_rank=0, name=name)

    def broadcast(self, tensors: Mapping[str, Tensor]) -> None:
        self.hvd.broadcast_parameters(dict(tensors), root_rank=0)

    def start_sum(self, tensor: Tensor, name: str) -> Any:
        return self.hvd.allreduce_async_(tensor, op=self.hvd.Sum, name=name)

    def finish(self, handle: Any) -> None:
        self.hvd.synchronize(handle)

    def is_lost_peer(self, error: BaseException) -> bool:
        return type(error).__name__ == "HorovodInternalError"

    def is_waiting(self, frame: FrameType) -> bool:
        return f"{os.sep}horovod{os.sep}" in frame.f_code.co_filename

    def leave(self, code: int) -> None:
        self.hvd.shutdown()  # MPI complains about ranks that end without it
        World.abort(self, code)

    def abort(self, code: int) -> None:
        """End the whole job with exit code `code`, which mpirun returns."""
        flush_output()
        # MPI_Abort may hang if a host cannot be reached. The launcher ends the other ranks after this one has exited.
        last_resort = threading.Timer(_ABORT_SECONDS, os._exit, (code,))
        last_resort.daemon = True
        last_resort.start()
        try:
            import mpi4py

            mpi4py.rc.initialize = False
            from mpi4py import MPI

            if MPI.Is_initialized() and not MPI.Is_finalized():
                MPI.COMM_WORLD.Abort(code)
        except ImportError:
            pass
        os._exit(code)


def join(
    environment: MutableMapping[str, str] = os.environ,
    *,
    on_cpu: bool = False,
    stall_seconds: float = 0.0,
) -> World:
    """Initialise Horovod. If it sees no other rank, return the single-process world.

    Horovod's variables that are already set in the environment take precedence over the settings made here.

    Args:
        environment: Environment of this process.
        on_cpu: Whether the gradients are on CPUs.
        stall_seconds: How long a rank may keep the others waiting; 0: no limit.

    Raises:
        ImportError: Horovod is not installed or cannot be loaded.
    """
    import horovod.torch as hvd

    if on_cpu:
        # Between ranks of one host, messages that fit into the CPU cache are faster than Horovod's default of 64 MiB.
        environment.setdefault("HOROVOD_FUSION_THRESHOLD", str(World.cpu_bucket_bytes))
        # Horovod's thread polls the other ranks a thousand times a second. By default Open MPI spins while it waits,
        # which takes the core from the computation.
        environment.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    if stall_seconds:
        # Horovod names the missing ranks and gives up after twice this time. Our watchdog comes first and reports more.
        seconds = math.ceil(stall_seconds)
        environment.setdefault(
            "HOROVOD_STALL_CHECK_TIME_SECONDS", str(max(1, min(60, seconds // 2)))
        )
        environment.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(2 * seconds))
    hvd.init()
    return HorovodWorld(hvd) if hvd.size() > 1 else World()
