"""Where gradients are kept, and how they are summed over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lars.comm.world import World

# Half precision reaches 65504. The last step's greatest gradient is scaled to at most 4096, which leaves room for
# sixteenfold growth.
_HALF_TARGET = 4096.0


class LocalGradients:
    """Gradients of a single process: they stay where autograd puts them.

    Attributes:
        notices: A few numbers that travel with each step's exchange, such as whether a rank was asked to stop. After
            `finish_exchange` they are sums over the ranks, so that all ranks know the same at the same step.
    """

    NOTICES = 4

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the parameters whose gradients will be used."""
        self.parameters = [p for p in parameters if p.requires_grad]
        device = self.parameters[0].device if self.parameters else None
        self.notices = torch.zeros(self.NOTICES, device=device)

    def zero(self) -> None:
        """Forget the last step's gradients and notices."""
        self.notices.zero_()
        for parameter in self.parameters:
            parameter.grad = None

    def begin_exchange(self) -> None:
        """Announce that the next backward pass is the step's last one."""

    def finish_exchange(self) -> None:
        """Return when every gradient is the sum over all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """What the exchange remembers from step to step, as plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


@dataclass
class _Bucket:
    """A contiguous piece of gradient memory that is exchanged in one collective.

    Attributes:
        name: Name of the collective.
        flat: The gradients.
        views: Each parameter with its place in `flat`.
        waiting_for: Number of parameters whose gradient is not complete yet.
        scale: Factor of the half-precision numbers that are sent; None: full precision is sent.
    """

    name: str
    flat: Tensor
    views: list[tuple[nn.Parameter, Tensor]]
    waiting_for: int = 0
    scale: float | None = None
    handle: Any = field(default=None, init=False)
    in_flight: bool = field(default=False, init=False)
    sent: Tensor = field(init=False)

    def send(self, world: World) -> None:
        self.sent = self.flat if self.scale is None else (self.flat * self.scale).half()
        self.handle, self.in_flight = world.start_sum(self.sent, self.name), True

    def receive(self, world: World) -> None:
        world.finish(self.handle)
        self.in_flight = False

    def greatest(self) -> Tensor:
        """Largest absolute value that was received, in units of the gradients."""
        return self.sent.abs().amax().float() / (self.scale or 1.0)

    def unpack(self) -> None:
        if self.scale is not None:
            self.flat.copy_(self.sent).div_(self.scale)


class ExchangedGradients(LocalGradients):
    """Gradients in flat buffers, summed over the ranks bucket by bucket as the backward pass completes them.

    Each parameter's ``grad`` is a view of a buffer with the parameter's own strides. The buffer is contiguous, as
    collectives require. The views keep channels-last layouts, as autograd and the fused kernels require.
    A parameter that receives no gradient on any rank has a gradient of zeros.

    With `fp16`, buckets are sent in half precision, scaled by a power of two so that they neither overflow nor vanish.
    The scale follows the last step's gradients, which all ranks know. A bucket that has no scale yet, or outgrows it,
    is exchanged in full precision.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        world: World,
        *,
        fp16: bool = False,
    ) -> None:
        """Lay out the buffers, last parameter first, which is the order in which the backward pass finishes them.

        Args:
            parameters: The model's parameters.
            world: The ranks to sum over.
            fp16: Whether to send half-precision numbers.
        """
        super().__init__(parameters)
        self.world, self.fp16 = world, fp16
        self.armed = False
        on_cpu = all(p.device.type == "cpu" for p in self.parameters)
        bucket_bytes = world.cpu_bucket_bytes if on_cpu else world.gpu_bucket_bytes
        groups = list(_groups_of(reversed(self.parameters), bucket_bytes))
        self.buckets = [self._bucket(i, group) for i, group in enumerate(groups[:-1])]
        # The notices travel with the last gradients, but alone in full precision if these are sent in half precision.
        self.buckets.append(self._bucket(len(groups) - 1, groups[-1], 0 if fp16 else self.NOTICES))
        if fp16:
            self.buckets.append(_Bucket("notices", self.notices, []))
        self.notices = self.buckets[-1].flat[-self.NOTICES :]

    def _bucket(self, number: int, group: list[nn.Parameter], extra: int = 0) -> _Bucket:
        numel = sum(p.numel() for p in group)
        flat = torch.zeros(numel + extra, dtype=group[0].dtype, device=group[0].device)
        views, offset = [], 0
        for parameter in group:
            views.append((parameter, _view_like(flat, offset, parameter)))
            offset += parameter.numel()
        bucket = _Bucket(f"gradients.{number}", flat, views)
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
        """Send each bucket as soon as the next backward pass has completed it; the one with the notices goes last."""
        for bucket in self.buckets[:-1]:
            bucket.waiting_for = len(bucket.views)
        self.armed = True

    def finish_exchange(self) -> None:
        """Send the buckets that are not in flight yet, and wait for all of them."""
        self.armed = False
        for bucket in self.buckets:
            if not bucket.in_flight:
                bucket.send(self.world)
        for bucket in self.buckets:
            bucket.receive(self.world)
        if self.fp16:
            self._unpack_halves()

    def _unpack_halves(self) -> None:
        """Scale half-precision sums back. A bucket that outgrew its scale is exchanged again in full precision.

        All ranks hold the same sums, so all decide alike.
        """
        for bucket, most in zip(self.buckets, self._greatest(), strict=True):
            if bucket.scale is not None and not math.isfinite(most):
                bucket.scale = None
                bucket.send(self.world)
                bucket.receive(self.world)
        greatest = self._greatest()
        for bucket, most in zip(self.buckets, greatest, strict=True):
            bucket.unpack()
            bucket.scale = _half_scale(most) if bucket.views else None

    def _greatest(self) -> list[float]:
        return torch.stack([bucket.greatest() for bucket in self.buckets]).tolist()

    def state_dict(self) -> dict[str, Any]:
        """The scales of half-precision numbers."""
        return {"scales": [bucket.scale for bucket in self.buckets]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scales if they belong to the same buckets."""
        scales = state.get("scales", [])
        if self.fp16 and len(scales) == len(self.buckets):
            for bucket, scale in zip(self.buckets, scales, strict=True):
                bucket.scale = scale

    def _ready_hook(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def ready(_: Tensor) -> None:
            if self.armed and bucket.waiting_for:
                bucket.waiting_for -= 1
                if bucket.waiting_for == 0:
                    bucket.send(self.world)

        return ready


def _half_scale(greatest: float) -> float | None:
    """The power of two that scales `greatest` to just below the target; None if there is no such power."""
    if not (math.isfinite(greatest) and greatest > 0):
        return None
    return 2.0 ** math.floor(math.log2(_HALF_TARGET / greatest))


def _groups_of(parameters: Iterable[nn.Parameter], most_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Split parameters into buckets: neighbours of one dtype that fit together, at least one in each."""
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
    """A view of `flat` with the shape of `parameter`, and with its strides if these leave no gaps in memory."""
    piece = flat[offset : offset + parameter.numel()]
    if torch.empty_like(parameter).stride() == parameter.stride():
        return piece.as_strided(parameter.shape, parameter.stride(), piece.storage_offset())
    return piece.view(parameter.shape)


def make_gradients(
    parameters: Iterable[nn.Parameter], world: World, *, fp16: bool = False
) -> LocalGradients:
    """The gradients of a model in a world; `fp16` sends half-precision numbers."""
    if world.size == 1:
        return LocalGradients(parameters)
    return ExchangedGradients(parameters, world, fp16=fp16)
