"""What is measured: sums on the device, divided once at the end.

Means of batch means are wrong when batches differ in size; sums over all samples are exact for any number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMES = ("loss", "top1", "top5")


class Sums:
    """Sums of loss, top-1 hits, top-5 hits and samples, in float64, kept where the model is.

    Nothing is read back before `totals` is, so counting never makes the device wait.
    """

    def __init__(self, device: torch.device | str, start: Tensor | None = None) -> None:
        """Begin at zero, or at the totals in `start`."""
        start = torch.zeros(4, dtype=torch.float64) if start is None else start
        self.totals = start.to(device, copy=True)

    def add(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            loss_sum: Sum of the batch's losses, a scalar.
            logits: Shape (n, classes).
            labels: Shape (n,), int64.
        """
        best = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        self.totals[0] += loss_sum.detach()
        self.totals[1] += hits[:, 0].sum()
        self.totals[2] += hits.sum()
        self.totals[3] += len(labels)


def means(totals: Tensor) -> dict[str, float]:
    """Loss, and top-1 and top-5 in percent, from (the sum over all ranks of) `Sums.totals`.

    With fewer than five classes every sample is a top-5 hit. Without samples all are nan.
    """
    loss, top1, top5, count = totals.tolist()
    if not count:
        return dict.fromkeys(NAMES, float("nan"))
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}
