"""The only door to Horovod and MPI. A world of one needs neither.

Laws of Horovod 0.28.1 that shape this room: every collective has a name, because unnamed ones get out
of step; optimizer state is never broadcast, because Horovod takes a real optimizer step to create it; and
gradients are exchanged here rather than by its optimizer wrapper, which refuses channels-last gradients and
rebuilds the optimizer.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from lars import launched
from lars.config import UsageError
from lars.gradients import ExchangedGradients, LocalGradients

EXIT_LOST_PEER = 7
_ABORT_SECONDS = 5.0

# MPI between ranks of one host likes messages that stay in the cache better than Horovod's usual 64 MiB; networks and
# NCCL like larger ones.
CPU_FUSION_BYTES = 1 << 20
GPU_BUCKET_BYTES = 16 << 20


class World:
    """A world of one rank; every operation over the ranks is what it is with one."""

    rank = 0
    size = 1
    local_rank = 0

    @property
    def is_root(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def sum(self, tensor: Tensor, name: str) -> Tensor:
        """Sum of `tensor` over the ranks; `name` must be the same everywhere and tell collectives apart."""
        return tensor

    def gather(self, tensor: Tensor, name: str) -> Tensor:
        """Every rank's `tensor` (of one shape), stacked by rank."""
        return tensor[None]

    def gather_objects(self, value: Any, name: str) -> list[Any]:
        """Every rank's `value` (anything that can be pickled), by rank."""
        return [value]

    def from_root(self, value: Any, name: str) -> Any:
        """Rank 0's `value` (anything that can be pickled) on every rank."""
        return value

    def broadcast_model(self, model: nn.Module) -> None:
        """Give every rank the root's parameters and buffers."""

    def average_buffers(self, buffers: Iterable[Tensor]) -> None:
        """Average floating-point buffers over the ranks, so that all evaluate and save one model.

        Counts become the root's: it has run the most micro-batches, since those of a short step go to the lowest ranks.
        """

    def barrier(self, name: str) -> None:
        """Wait until every rank has come here."""
        self.sum(torch.zeros(1), name)

    def gradients(
        self, parameters: Iterable[nn.Parameter], *, fp16: bool = False
    ) -> LocalGradients:
        """Make the exchange of gradients; `fp16` sends half-precision numbers."""
        return LocalGradients(parameters)

    def abort(self, code: int) -> None:
        """End the whole job with exit code `code`."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class HorovodWorld(World):
    """Several ranks, through Horovod."""

    def __init__(self, hvd: Any) -> None:
        """Read the world's shape; `hvd` is horovod.torch, already initialised."""
        self.hvd = hvd
        self.rank, self.size, self.local_rank = hvd.rank(), hvd.size(), hvd.local_rank()

    def sum(self, tensor: Tensor, name: str) -> Tensor:
        return self.hvd.allreduce(tensor, op=self.hvd.Sum, name=name)

    def gather(self, tensor: Tensor, name: str) -> Tensor:
        return self.hvd.allgather(tensor[None], name=name)

    def gather_objects(self, value: Any, name: str) -> list[Any]:
        return self.hvd.allgather_object(value, name=name)

    def from_root(self, value: Any, name: str) -> Any:
        return self.hvd.broadcast_object(value, root_rank=0, name=name)

    def broadcast_model(self, model: nn.Module) -> None:
        # Copies, because Horovod takes contiguous tensors only; once, before training.
        state = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
        self.hvd.broadcast_parameters(state, root_rank=0)
        model.load_state_dict(state)

    def average_buffers(self, buffers: Iterable[Tensor]) -> None:
        buffers = list(buffers)
        floats = [b for b in buffers if b.is_floating_point()]
        if floats:
            flat = torch.cat([b.detach().double().flatten() for b in floats])
            flat = self.sum(flat, "buffers") / self.size
            for buffer, mean in zip(floats, flat.split([b.numel() for b in floats]), strict=True):
                buffer.copy_(mean.view_as(buffer))
        counts = {f"counts.{i}": b for i, b in enumerate(buffers) if not b.is_floating_point()}
        self.hvd.broadcast_parameters(counts, root_rank=0)

    def gradients(
        self, parameters: Iterable[nn.Parameter], *, fp16: bool = False
    ) -> LocalGradients:
        parameters = list(parameters)
        on_cpu = all(p.device.type == "cpu" for p in parameters)
        bucket_bytes = CPU_FUSION_BYTES if on_cpu else GPU_BUCKET_BYTES
        return ExchangedGradients(parameters, self.hvd, fp16=fp16, bucket_bytes=bucket_bytes)

    def abort(self, code: int) -> None:
        """End the whole job with exit code `code`, which survives mpirun."""
        sys.stdout.flush()
        sys.stderr.flush()
        # MPI may hang where a host cannot be reached; the launcher ends the others when this rank is gone.
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


def start(
    environment: MutableMapping[str, str] = os.environ,
    *,
    on_cpu: bool = False,
    stall_seconds: float = 0.0,
) -> World:
    """Join the world that the launcher made; without a launcher it is a world of one, and Horovod is not loaded.

    Horovod's own variables in the environment win over what is chosen here: for a world of CPUs (`on_cpu`), and for
    how long a rank may keep the others waiting (`stall_seconds`; 0: for ever).

    Raises:
        UsageError: A launcher started several tasks but this process would train alone: n tasks would each
            run the whole job, and write over each other.
    """
    if not launched.is_task(environment):
        return World()
    tasks, launcher = launched.tasks(environment)
    try:
        import horovod.torch as hvd
    except ImportError as error:
        if tasks > 1:
            raise UsageError(
                f"{launcher} started {tasks} tasks, but Horovod cannot be imported ({error}); "
                "run ./launch/setup.sh, or start one task"
            ) from error
        return World()
    if on_cpu:
        environment.setdefault("HOROVOD_FUSION_THRESHOLD", str(CPU_FUSION_BYTES))
        # Horovod's thread waits for the other ranks a thousand times a second; where Open MPI spins meanwhile, it
        # takes the core from the computation.
        environment.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    if stall_seconds:
        # Horovod names the missing ranks and, at twice the time, gives up; our own watchdog knows more and is earlier.
        seconds = math.ceil(stall_seconds)
        environment.setdefault(
            "HOROVOD_STALL_CHECK_TIME_SECONDS", str(max(1, min(60, seconds // 2)))
        )
        environment.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(2 * seconds))
    hvd.init()
    if hvd.size() > 1:
        return HorovodWorld(hvd)
    if tasks > 1:
        raise UsageError(
            f"{launcher} started {tasks} tasks, but each of them sees a world of one: {launcher} does not speak to the "
            "MPI that Horovod was built with; use that MPI's own mpirun, or srun --mpi=pmix"
        )
    return World()


@contextlib.contextmanager
def ending_together(world: World | None = None) -> Iterator[list[World]]:
    """Whatever goes wrong on one rank ends the whole job quickly, with one exit code and the first cause said once.

    Yields a list to which the world is to be appended once it is known.
    An error's ``exit_code`` attribute is the job's exit code. Errors with such a code are the user's to mend, and are
    told in a line; others with their traceback.
    """
    worlds = [world or World()]
    try:
        yield worlds
    except Exception as error:
        world = worlds[-1]
        lost_peer = type(error).__name__ == "HorovodInternalError"
        code = EXIT_LOST_PEER if lost_peer else getattr(error, "exit_code", 1)
        met = world.size > 1
        launched.take_turn(code, met=met, echo=lost_peer)
        where = f" (rank {world.rank} of {world.size}, {socket.gethostname()})" if met else ""
        if not hasattr(error, "exit_code"):
            traceback.print_exc()
        print(f"{os.path.basename(sys.argv[0])}: error{where}: {error}", file=sys.stderr)
        world.abort(code)
