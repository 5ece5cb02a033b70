"""Gradients: where they are kept, and how they are summed over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Half-precision numbers reach 65504; what is sent is scaled to 4096 at most by the last step's greatest gradient,
# which leaves room for it to grow sixteenfold.
_HALF_TARGET = 4096.0


class LocalGradients:
    """Gradients of a world of one: they are where autograd put them.

    Attributes:
        notices: A few numbers that every rank adds to the step's exchange: whether it has been asked to stop, and the
            like. After `finish_exchange` they are sums over the ranks, so that all know the same at the same step.
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
        """Go on from what `state_dict` gave."""


@dataclass
class _Bucket:
    """A contiguous piece of gradient memory that is exchanged at once.

    Attributes:
        name: Of the collective.
        flat: The gradients.
        views: Each parameter with its place in `flat`.
        waiting_for: Parameters whose gradient is not complete yet.
        scale: Factor of the half-precision numbers that are sent; None: full precision is sent.
    """

    name: str
    flat: Tensor
    views: list[tuple[nn.Parameter, Tensor]]
    waiting_for: int = 0
    scale: float | None = None
    handle: int | None = field(default=None, init=False)
    sent: Tensor = field(init=False)

    def send(self, hvd: Any) -> None:
        self.sent = self.flat if self.scale is None else (self.flat * self.scale).half()
        self.handle = hvd.allreduce_async_(self.sent, op=hvd.Sum, name=self.name)

    def receive(self, hvd: Any) -> None:
        hvd.synchronize(self.handle)
        self.handle = None
        if self.scale is not None:
            self.flat.copy_(self.sent).div_(self.scale)


class ExchangedGradients(LocalGradients):
    """Gradients in flat buffers, summed over the ranks bucket by bucket as the backward pass completes them.

    Each parameter's ``grad`` is a view of a buffer with the parameter's own strides: the buffer is contiguous, which
    Horovod asks for, and the views keep channels-last layouts, which autograd and the fused kernels ask for.
    A parameter that got no gradient on any rank has a gradient of zeros.

    With `fp16` half-precision numbers are sent, scaled by a power of two so that they neither overflow nor vanish. The
    scale follows the last step's gradients, which all ranks know; a bucket that has none yet, or whose
    sum was not finite, goes in full precision.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        hvd: Any,
        *,
        fp16: bool = False,
        bucket_bytes: int = 16 << 20,
    ) -> None:
        """Lay out the buffers, last parameter first: the order in which the backward pass finishes them.

        Args:
            parameters: Those of the model.
            hvd: horovod.torch, initialised.
            fp16: Send half-precision numbers.
            bucket_bytes: Gradients that are exchanged at once, if no single one is larger.
        """
        super().__init__(parameters)
        self.hvd, self.fp16 = hvd, fp16
        self.armed = False
        groups = list(_groups_of(reversed(self.parameters), bucket_bytes))
        self.buckets = [self._bucket(i, group) for i, group in enumerate(groups[:-1])]
        # The notices travel with the last gradients, or alone in full precision where those are sent in half.
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
        """Send what has not been sent, and wait for all."""
        self.armed = False
        for bucket in self.buckets:
            if bucket.handle is None:
                bucket.send(self.hvd)
        for bucket in self.buckets:
            bucket.receive(self.hvd)
        if self.fp16:
            greatest = torch.stack([b.flat.abs().amax().float() for b in self.buckets]).tolist()
            for bucket, most in zip(self.buckets, greatest, strict=True):
                bucket.scale = _half_scale(most) if bucket.views else None

    def state_dict(self) -> dict[str, Any]:
        """The scales of half-precision numbers."""
        return {"scales": [bucket.scale for bucket in self.buckets]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the scales, if they are of buckets like these."""
        scales = state.get("scales", [])
        if self.fp16 and len(scales) == len(self.buckets):
            for bucket, scale in zip(self.buckets, scales, strict=True):
                bucket.scale = scale

    def _ready_hook(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def ready(_: Tensor) -> None:
            if self.armed and bucket.waiting_for:
                bucket.waiting_for -= 1
                if bucket.waiting_for == 0:
                    bucket.send(self.hvd)

        return ready


def _half_scale(greatest: float) -> float | None:
    """The power of two that takes `greatest` to just below the target; None where there is none."""
    if not (math.isfinite(greatest) and greatest > 0):
        return None
    return 2.0 ** math.floor(math.log2(_HALF_TARGET / greatest))


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
    if torch.empty_like(parameter).stride() == parameter.stride():
        return piece.as_strided(parameter.shape, parameter.stride(), piece.storage_offset())
    return piece.view(parameter.shape)
