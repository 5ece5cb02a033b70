"""The only door to Horovod and MPI. A world of one needs neither.

Laws of Horovod 0.28.1 that shape this room: every collective has a name, because unnamed ones get out
of step; optimizer state is never broadcast, because Horovod takes a real optimizer step to create it; and
gradients are exchanged here rather than by its optimizer wrapper, which refuses channels-last gradients and
rebuilds the optimizer.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lars.config import UsageError

EXIT_LOST_PEER = 7

# What launchers leave in the environment of their tasks; where they write the number of tasks, and the rank.
_LAUNCHER_PREFIXES = (
    "OMPI_",
    "PMI_",
    "PMIX_",
    "MV2_",
    "MPI_LOCAL",
    "SLURM_STEP_",
    "JSM_",
    "PALS_",
    "ALPS_",
    "HOROVOD_",
)
_SIZE_VARIABLES = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
    "HOROVOD_SIZE": "horovodrun",
}
_LOCAL_SIZE_VARIABLES = (
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "HOROVOD_LOCAL_SIZE",
    "SLURM_STEP_TASKS_PER_NODE",  # such as 2(x3): the first number is of the first hosts
)
_RANK_VARIABLES = (
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "MV2_COMM_WORLD_RANK",
    "SLURM_PROCID",
    "HOROVOD_RANK",
)

# Horovod fuses and caches on its side; buckets let the exchange begin while the backward pass still runs.
BUCKET_BYTES = 16 << 20


class LocalGradients:
    """Gradients of a world of one: they are where autograd put them."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the parameters whose gradients will be used."""
        self.parameters = [p for p in parameters if p.requires_grad]

    def zero(self) -> None:
        """Forget the last step's gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def begin_exchange(self) -> None:
        """Announce that the next backward pass is the step's last one."""

    def finish_exchange(self) -> None:
        """Return when every gradient is the sum over all ranks."""


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

    def from_root(self, value: Any, name: str) -> Any:
        """Rank 0's `value` (anything that can be pickled) on every rank."""
        return value

    def broadcast_model(self, model: nn.Module) -> None:
        """Give every rank the root's parameters and buffers."""

    def average_batch_norm(self, model: nn.Module) -> None:
        """Average running means and variances over the ranks, so that all evaluate and save one model."""

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


@dataclass
class _Bucket:
    """A contiguous piece of gradient memory that is exchanged at once."""

    name: str
    flat: Tensor
    size: int
    waiting_for: int = 0
    handle: int | None = None
    sent: Tensor = field(init=False)

    def send(self, hvd: Any, fp16: bool) -> None:
        self.sent = self.flat.half() if fp16 and self.flat.is_floating_point() else self.flat
        self.handle = hvd.allreduce_async_(self.sent, op=hvd.Sum, name=self.name)

    def receive(self, hvd: Any) -> None:
        hvd.synchronize(self.handle)
        self.handle = None
        if self.sent is not self.flat:
            self.flat.copy_(self.sent)


class ExchangedGradients(LocalGradients):
    """Gradients that live in flat buffers and are summed over the ranks, bucket by bucket, as they become ready.

    Each parameter's ``grad`` is a view of a buffer with the parameter's own strides: the buffer is contiguous, which
    Horovod asks for, and the views keep channels-last layouts, which autograd and the fused kernels ask for.
    A parameter that got no gradient on any rank has a gradient of zeros.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], hvd: Any, fp16: bool) -> None:
        """Lay out the buffers, last parameter first: the order in which the backward pass finishes them."""
        super().__init__(parameters)
        self.hvd, self.fp16 = hvd, fp16
        self.armed = False
        self.buckets: list[_Bucket] = []
        self.members: list[list[tuple[nn.Parameter, Tensor]]] = []
        for group in _groups_of(reversed(self.parameters), BUCKET_BYTES):
            flat = torch.zeros(
                sum(p.numel() for p in group), dtype=group[0].dtype, device=group[0].device
            )
            bucket = _Bucket(f"gradients.{len(self.buckets)}", flat, len(group))
            offset = 0
            views = []
            for parameter in group:
                views.append((parameter, _view_like(flat, offset, parameter)))
                offset += parameter.numel()
                parameter.register_post_accumulate_grad_hook(self._ready_hook(bucket))
            self.buckets.append(bucket)
            self.members.append(views)

    def zero(self) -> None:
        """Set all gradients to zero, in place."""
        for bucket, views in zip(self.buckets, self.members, strict=True):
            bucket.flat.zero_()
            for parameter, view in views:
                parameter.grad = view

    def begin_exchange(self) -> None:
        """Send each bucket as soon as the next backward pass has completed it."""
        for bucket in self.buckets:
            bucket.waiting_for = bucket.size
        self.armed = True

    def finish_exchange(self) -> None:
        """Send what has not been sent, and wait for all."""
        self.armed = False
        for bucket in self.buckets:
            if bucket.handle is None:
                bucket.send(self.hvd, self.fp16)
        for bucket in self.buckets:
            bucket.receive(self.hvd)

    def _ready_hook(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def ready(_: Tensor) -> None:
            if self.armed:
                bucket.waiting_for -= 1
                if bucket.waiting_for == 0:
                    bucket.send(self.hvd, self.fp16)

        return ready


def _groups_of(parameters: Iterable[nn.Parameter], most_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one kind that fit into a bucket together; at least one each."""
    group: list[nn.Parameter] = []
    held = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if group and (held + size > most_bytes or parameter.dtype != group[0].dtype):
            yield group
            group, held = [], 0
        group.append(parameter)
        held += size
    if group:
        yield group


def _view_like(flat: Tensor, offset: int, parameter: Tensor) -> Tensor:
    """A view of `flat` with the shape of `parameter`, and its strides where they fill the memory without gaps."""
    piece = flat[offset : offset + parameter.numel()]
    dense = torch.empty_like(parameter).stride() == parameter.stride()
    return (
        piece.as_strided(parameter.shape, parameter.stride(), piece.storage_offset())
        if dense
        else (piece.view(parameter.shape))
    )


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

    def from_root(self, value: Any, name: str) -> Any:
        return self.hvd.broadcast_object(value, root_rank=0, name=name)

    def broadcast_model(self, model: nn.Module) -> None:
        # Copies, because Horovod takes contiguous tensors only; once, before training.
        state = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
        self.hvd.broadcast_parameters(state, root_rank=0)
        model.load_state_dict(state)

    def average_batch_norm(self, model: nn.Module) -> None:
        running = [
            b for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))
        ]
        if not running:
            return
        flat = torch.cat([b.detach().double().flatten() for b in running])
        flat = self.sum(flat, "batch_norm") / self.size
        for buffer, mean in zip(running, flat.split([b.numel() for b in running]), strict=True):
            buffer.copy_(mean.view_as(buffer))
        counts = [b for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
        if (
            counts
        ):  # the root has run the most micro-batches: those of a short step go to the lowest ranks
            self.hvd.broadcast_parameters(
                {f"batches.{i}": c for i, c in enumerate(counts)}, root_rank=0
            )

    def gradients(
        self, parameters: Iterable[nn.Parameter], *, fp16: bool = False
    ) -> LocalGradients:
        return ExchangedGradients(parameters, self.hvd, fp16)

    def abort(self, code: int) -> None:
        """End the whole job with exit code `code`, which survives mpirun."""
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            import mpi4py

            mpi4py.rc.initialize = False
            from mpi4py import MPI

            if MPI.Is_initialized() and not MPI.Is_finalized():
                MPI.COMM_WORLD.Abort(code)
        except ImportError:
            pass
        os._exit(code)


def allotted_cpus(environment: Mapping[str, str] = os.environ) -> int:
    """CPUs that this rank may keep busy, at least 1; known before the ranks have met.

    ``SLURM_CPUS_PER_TASK`` counts if it is set. Else the CPUs this process may run on, which follow cpusets and a
    launcher's binding, divided by the ranks of this host where these cannot all have CPUs of their own.
    """
    mine = len(os.sched_getaffinity(0))
    if environment.get("SLURM_CPUS_PER_TASK", "").isdigit():
        return max(1, min(mine, int(environment["SLURM_CPUS_PER_TASK"])))
    said = next((environment[name] for name in _LOCAL_SIZE_VARIABLES if name in environment), "1")
    local_size = int(re.sub(r"\D.*", "", said) or 1)
    bound = mine * local_size <= (os.cpu_count() or 1)
    return mine if bound else max(1, mine // local_size)


def start(environment: Mapping[str, str] = os.environ) -> World:
    """Join the world that the launcher made; without a launcher it is a world of one, and Horovod is not loaded.

    Raises:
        UsageError: A launcher started several tasks but this process would train alone: n tasks would each
            run the whole job, and write over each other.
    """
    if not any(name.startswith(_LAUNCHER_PREFIXES) for name in environment):
        return World()
    tasks, launcher = max(
        (
            (int(environment[name]), who)
            for name, who in _SIZE_VARIABLES.items()
            if name in environment
        ),
        default=(1, "the launcher"),
    )
    try:
        import horovod.torch as hvd
    except ImportError as error:
        if tasks > 1:
            raise UsageError(
                f"{launcher} started {tasks} tasks, but Horovod cannot be imported ({error}); "
                "run ./launch/setup.sh, or start one task"
            ) from error
        return World()
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
        rank = max(world.rank, *(int(os.environ.get(name, 0)) for name in _RANK_VARIABLES))
        lost_peer = type(error).__name__ == "HorovodInternalError"
        code = EXIT_LOST_PEER if lost_peer else getattr(error, "exit_code", 1)
        if rank > 0 or lost_peer:
            # Most errors happen everywhere at once, and one rank's failure is an echo on the others: the root, or
            # the rank that failed first, speaks and ends the job before this rank has waited.
            time.sleep(2.0 + 2.0 * lost_peer)
        where = f" (rank {rank} of {world.size}, {socket.gethostname()})" if world.size > 1 else ""
        if not hasattr(error, "exit_code"):
            traceback.print_exc()
        print(f"{os.path.basename(sys.argv[0])}: error{where}: {error}", file=sys.stderr)
        world.abort(code)
