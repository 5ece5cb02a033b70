"""Storage of gradients and their sum over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lars.comm.world import World

# The largest half-precision number is 65504. The largest gradient of the last step is scaled to at most 4096, so
# gradients may grow sixteenfold in one step.
_HALF_TARGET = 4096.0


class LocalGradients:
    """Gradients of a single process. They stay where autograd puts them.

    Attributes:
        notices: A few numbers that are exchanged with the gradients of each step, such as whether a rank was asked to
            stop. After `finish_exchange` they are sums over the ranks, so all ranks have the same information.
    """

    NOTICES = 4

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep the parameters that require gradients."""
        self.parameters = [p for p in parameters if p.requires_grad]
        device = self.parameters[0].device if self.parameters else None
        self.notices = torch.zeros(self.NOTICES, device=device)

    def zero(self) -> None:
        """Clear the gradients and notices of the last step."""
        self.notices.zero_()
        for parameter in self.parameters:
            parameter.grad = None

    def begin_exchange(self) -> None:
        """Announce that the next backward pass is the last one of the step."""

    def finish_exchange(self) -> None:
        """Wait until every gradient is the sum over all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """The state that the exchange keeps between steps, as plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


@dataclass
class _Bucket:
    """A contiguous piece of gradient memory that is exchanged in one collective.

    Attributes:
        name: Name of the collective.
        flat: The gradients.
        views: Each parameter with its view of `flat`.
        waiting_for: Number of parameters whose gradient is not complete yet.
        reduce_dtype: Type of the numbers that are sent, if `scale` is not None.
        scale: Scale of the gradients that are sent. None: they are sent as they are, in full precision.
    """

    name: str
    flat: Tensor
    views: list[tuple[nn.Parameter, Tensor]]
    reduce_dtype: torch.dtype | None = None
    waiting_for: int = 0
    scale: float | None = field(default=None, init=False)
    handle: Any = field(default=None, init=False)
    sent: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rescale(None)

    def rescale(self, largest: float | None) -> None:
        """Choose the scale of the next exchange by the largest gradient of this one, if that is known."""
        if self.reduce_dtype is torch.bfloat16:
            self.scale = 1.0  # it has the range of float32
        elif self.reduce_dtype is not None:
            self.scale = _half_scale(largest) if largest is not None else None

    def send(self, world: World) -> None:
        scaled = self.flat if self.scale in (None, 1.0) else self.flat * self.scale
        self.sent = self.flat if self.scale is None else scaled.to(self.reduce_dtype)
        self.handle = world.start_sum(self.sent, self.name)

    def receive(self, world: World) -> None:
        world.finish(self.handle)

    def greatest(self) -> Tensor:
        """Largest absolute value that was received, unscaled."""
        return self.sent.abs().amax().float() / (self.scale or 1.0)

    def unpack(self) -> None:
        if self.scale is not None:
            self.flat.copy_(self.sent).div_(self.scale)


class ExchangedGradients(LocalGradients):
    """Gradients in flat buffers, summed over the ranks bucket by bucket as the backward pass completes them.

    Each parameter's ``grad`` is a view of a buffer with the parameter's own strides. The buffer is contiguous, as
    collectives require. The views keep channels-last layouts, as autograd and the fused kernels require. The gradient
    of a parameter that no rank uses is zero.

    With `reduce_dtype`, buckets are sent as 16-bit floats. For torch.float16, a power of two scales them so that they
    neither overflow nor underflow. The scale is derived from the gradients of the last step, which are equal on all
    ranks. A bucket that has no scale yet, or that overflows with it, is exchanged in full precision. torch.bfloat16
    needs no scale, because it has the range of torch.float32, but it has 8 significant bits instead of 11.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        world: World,
        *,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        """Lay out the buffers from the last parameter to the first, the order in which backward completes gradients.

        Args:
            parameters: The model's parameters.
            world: The ranks over which gradients are summed.
            reduce_dtype: Type in which gradients are sent: torch.float16, torch.bfloat16, or None for their own.
        """
        super().__init__(parameters)
        self.world, self.reduce_dtype = world, reduce_dtype
        self.armed = False
        self.next_bucket = 0  # buckets of the current step that have been sent
        on_cpu = all(p.device.type == "cpu" for p in self.parameters)
        bucket_bytes = world.cpu_bucket_bytes if on_cpu else world.gpu_bucket_bytes
        groups = list(_groups_of(reversed(self.parameters), bucket_bytes))
        self.buckets = [self._bucket(i, group) for i, group in enumerate(groups[:-1])]
        # The last bucket also carries the notices. With half-precision gradients they get their own bucket in full
        # precision.
        extra = 0 if reduce_dtype else self.NOTICES
        self.buckets.append(self._bucket(len(groups) - 1, groups[-1], extra))
        if reduce_dtype:
            self.buckets.append(_Bucket("notices", self.notices, []))
        self.notices = self.buckets[-1].flat[-self.NOTICES :]

    def _bucket(self, number: int, group: list[nn.Parameter], extra: int = 0) -> _Bucket:
        numel = sum(p.numel() for p in group)
        flat = torch.zeros(numel + extra, dtype=group[0].dtype, device=group[0].device)
        views, offset = [], 0
        for parameter in group:
            views.append((parameter, _view_like(flat, offset, parameter)))
            offset += parameter.numel()
        bucket = _Bucket(f"gradients.{number}", flat, views, self.reduce_dtype)
        for parameter in group:
            parameter.register_post_accumulate_grad_hook(self._ready_hook(bucket))
        return bucket

    def zero(self) -> None:
        """Set all gradients and notices to zero, in place."""
        for bucket in self.buckets:
            bucket.flat.zero_()
            for parameter, view in bucket.views:
                parameter.grad = view

    def begin_exchange(self) -> None:
        """Send each bucket as soon as the next backward pass completes it and all buckets before it.

        Every rank sends the buckets in the same order, because torch.distributed pairs collectives by their order. The
        bucket with the notices is sent last.
        """
        for bucket in self.buckets[:-1]:
            bucket.waiting_for = len(bucket.views)
        self.next_bucket = 0
        self.armed = True

    def finish_exchange(self) -> None:
        """Send the buckets that are not in flight yet, and wait for all of them."""
        self.armed = False
        for bucket in self.buckets[self.next_bucket :]:
            bucket.send(self.world)
        self.next_bucket = 0
        for bucket in self.buckets:
            bucket.receive(self.world)
        if self.reduce_dtype:
            self._unpack_halves()

    def _send_complete(self) -> None:
        """Send the next buckets in order as long as they are complete."""
        for bucket in self.buckets[self.next_bucket : -1]:
            if bucket.waiting_for:
                return
            bucket.send(self.world)
            self.next_bucket += 1

    def _unpack_halves(self) -> None:
        """Undo the scaling of half-precision sums. A bucket that overflowed is exchanged again in full precision.

        All ranks hold the same sums, so they all make the same decisions. torch.bfloat16 overflows only where
        torch.float32 does. So the host need not read these sums.
        """
        if self.reduce_dtype is torch.bfloat16:
            for bucket in self.buckets:
                bucket.unpack()
            return
        for bucket, largest in zip(self.buckets, self._greatest(), strict=True):
            if bucket.scale is not None and not math.isfinite(largest):
                bucket.scale = None
                bucket.send(self.world)
                bucket.receive(self.world)
        for bucket, largest in zip(self.buckets, self._greatest(), strict=True):
            bucket.unpack()
            bucket.rescale(largest)

    def _greatest(self) -> list[float]:
        return torch.stack([bucket.greatest() for bucket in self.buckets]).tolist()

    def state_dict(self) -> dict[str, Any]:
        """The half-precision scale of each bucket."""
        return {"scales": [bucket.scale for bucket in self.buckets]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scales of torch.float16, if the buckets are the same. Other types need none."""
        scales = state.get("scales", [])
        if self.reduce_dtype is torch.float16 and len(scales) == len(self.buckets):
            for bucket, scale in zip(self.buckets, scales, strict=True):
                bucket.scale = scale

    def _ready_hook(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def ready(_: Tensor) -> None:
            if self.armed and bucket.waiting_for:
                bucket.waiting_for -= 1
                self._send_complete()

        return ready


def _half_scale(greatest: float) -> float | None:
    """The largest power of two that scales `greatest` to at most the target. None if there is none."""
    if not (math.isfinite(greatest) and greatest > 0):
        return None
    return 2.0 ** math.floor(math.log2(_HALF_TARGET / greatest))


def _groups_of(parameters: Iterable[nn.Parameter], most_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Group neighbouring parameters of the same dtype into buckets of at most `most_bytes`, or of one parameter."""
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
    """A view of `flat` with the shape of `parameter`, and with its strides if the parameter is dense in memory."""
    piece = flat[offset : offset + parameter.numel()]
    if torch.empty_like(parameter).stride() == parameter.stride():
        return piece.as_strided(parameter.shape, parameter.stride(), piece.storage_offset())
    return piece.view(parameter.shape)


def make_gradients(
    parameters: Iterable[nn.Parameter], world: World, *, reduce_dtype: torch.dtype | None = None
) -> LocalGradients:
    """Create the gradients of a model for a world. `reduce_dtype`: see `ExchangedGradients`."""
    if world.size == 1:
        return LocalGradients(parameters)
    return ExchangedGradients(parameters, world, reduce_dtype=reduce_dtype)
