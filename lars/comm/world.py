"""The contract of a world: the collective operations that the trainer needs.

`World` itself is the single-process communicator: every collective returns its input. A backend derives from it and
overrides the primitives. The other methods are built from the primitives. A new backend is a file in this folder and
a row in `lars.names.BACKENDS`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn


def flush_output() -> None:
    """Write what was printed. If the disk of the log is full, the job must end nevertheless."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()


class World:
    """Single-process communicator and base class of all others.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        local_rank: Number of this process on its host, from 0.
        backend: Name of the backend for messages to the user. Empty if this process communicates with no other.
        cpu_bucket_bytes: Size of a gradient bucket on CPUs.
        gpu_bucket_bytes: Size of a gradient bucket on GPUs.
    """

    rank = 0
    size = 1
    local_rank = 0
    backend = ""
    cpu_bucket_bytes = 1 << 20
    gpu_bucket_bytes = 16 << 20

    @property
    def is_root(self) -> bool:
        """Whether this rank writes files and reports to the user."""
        return self.rank == 0

    # ------------------------------------------------------------------------------- primitives

    def all_reduce(self, tensor: Tensor, name: str) -> Tensor:
        """Return the sum of `tensor` over the ranks. `name` identifies the collective and is equal on all ranks."""
        return tensor

    def all_gather(self, tensor: Tensor, name: str) -> Tensor:
        """Return every rank's `tensor`, stacked in the order of the ranks. All have the same shape."""
        return tensor[None]

    def all_gather_object(self, value: Any, name: str) -> list[Any]:
        """Return a list of every rank's `value`, which must be picklable."""
        return [value]

    def broadcast_object(self, value: Any, name: str) -> Any:
        """Return rank 0's `value`, which must be picklable."""
        return value

    def broadcast(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite contiguous tensors in place with those of rank 0."""

    def start_sum(self, tensor: Tensor, name: str) -> Any:
        """Start to sum a contiguous tensor over the ranks in place. Return a handle for `finish`."""
        return None

    def finish(self, handle: Any) -> None:
        """Wait until the sum that `start_sum` started is complete."""

    def is_lost_peer(self, error: BaseException) -> bool:
        """Whether an error means that another rank has exited."""
        return False

    def is_waiting(self, frame: FrameType) -> bool:
        """Whether a stack frame shows that this process is waiting for other ranks."""
        return False

    def reports_first(self) -> bool:
        """Whether this rank is the first to call this method. Only that rank reports why the job ends.

        Backends whose launcher kills the other ranks soon after one has ended need not know.
        """
        return True

    def abort(self, code: int) -> None:
        """End the whole job with exit code `code`."""
        flush_output()
        os._exit(code)

    def leave(self, code: int) -> None:
        """End this process with exit code `code`. Every rank calls this at the same point."""
        self.abort(code)

    # ------------------------------------------------------------------------ built from primitives

    def barrier(self, name: str) -> None:
        """Wait until every rank has arrived here."""
        self.all_reduce(torch.zeros(1), name)

    def broadcast_model(self, model: nn.Module) -> None:
        """Copy the root's parameters and buffers to every rank."""
        if self.size == 1:
            return
        # Backends accept only contiguous tensors. The copies are made only once, before training.
        state = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
        self.broadcast(state)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(state[name])

    def average_buffers(self, buffers: Iterable[Tensor]) -> None:
        """Average floating-point buffers over the ranks, so that all ranks evaluate and save the same model.

        Integer buffers (counters) are copied from the root. It has run the most micro-batches, because a short step
        gives its micro-batches to the lowest ranks first.
        """
        if self.size == 1:
            return
        buffers = list(buffers)
        floats = [b for b in buffers if b.is_floating_point()]
        if floats:
            flat = torch.cat([b.detach().double().flatten() for b in floats])
            flat = self.all_reduce(flat, "buffers") / self.size
            for buffer, mean in zip(floats, flat.split([b.numel() for b in floats]), strict=True):
                buffer.copy_(mean.view_as(buffer))
        self.broadcast(
            {f"counters.{i}": b for i, b in enumerate(buffers) if not b.is_floating_point()}
        )
