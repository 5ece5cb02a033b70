"""The result of a step, and the few numbers from which the host computes it."""

from __future__ import annotations

import math
from typing import NamedTuple


class StepResult(NamedTuple):
    """The result of a step, which is the same on all ranks except for the times.

    Attributes:
        taken: Whether the weights were updated.
        stop: Whether a rank has been asked to stop.
        save: Whether the root has requested a checkpoint.
        nonfinite: Whether the step was skipped because its loss or a gradient is not finite.
        cause: Why the step was skipped.
        samples: Samples of the step over all ranks.
        seconds: Duration of the step on this rank, including the wait for data. If the host works ahead of the device,
            a step ends when the device has finished the step before it.
        data_seconds: The part of `seconds` in which the host waited for batches.
        exchange_seconds: The part of `seconds` in which the host waited for the sums of the gradients. The exchange
            overlaps the backward pass, and this is the part that it does not hide. On a GPU the host works ahead of
            the device, so this also includes the part of the backward pass that was still running.
        grad_norm: L2 norm of the gradient of the step, which is the mean over its samples, before --clip-grad-norm.
    """

    taken: bool
    stop: bool
    save: bool
    nonfinite: bool = False
    cause: str = ""
    samples: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    exchange_seconds: float = 0.0
    grad_norm: float = 0.0


class Notice(NamedTuple):
    """What the host learns about a step. All numbers are equal on all ranks.

    Attributes:
        norm: L2 norm of the exchanged gradient, which is the sum over the samples that were read / `samples`.
        place: Number of the last parameter with a gradient whose norm is not finite, from 1; 0: none.
        nonfinite: How many losses of all ranks are not finite.
        stop: How many ranks have been asked to stop.
        save: Whether the root has requested a checkpoint.
        samples_read: Samples that were read, over all ranks.
        scale: The fp16 loss scale of the step; 1 if there is none.
        next_scale: That of the next step.
    """

    norm: float
    place: float
    nonfinite: float
    stop: float
    save: float
    samples_read: float
    scale: float = 1.0
    next_scale: float = 1.0

    @property
    def is_usable(self) -> bool:
        """Whether the gradient may change the weights."""
        return math.isfinite(self.norm) and self.nonfinite == 0 and self.samples_read > 0


def result_of(notice: Notice, samples: int, layers: list[str]) -> StepResult:
    """Compute the result of a step.

    Args:
        notice: What the device has reported.
        samples: Samples of the step over all ranks.
        layers: Names of the parameters with a gradient.
    """
    result = StepResult(
        taken=notice.is_usable,
        stop=notice.stop > 0,
        save=notice.save > 0,
        samples=samples,
        grad_norm=notice.norm,
    )
    if result.taken:
        return result._replace(grad_norm=notice.norm * (samples / notice.samples_read))
    if notice.samples_read == 0:
        return result._replace(cause="none of its images could be read")
    if notice.nonfinite == 0 and 1 <= notice.next_scale < notice.scale:
        cause = f"the fp16 loss scale was too large; it is now {notice.next_scale:g}"
        return result._replace(cause=cause)
    layer = layers[int(notice.place) - 1] if notice.place else "the loss"
    return result._replace(nonfinite=True, cause=f"not finite, first in {layer}")
