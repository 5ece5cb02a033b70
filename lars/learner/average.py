"""The moving average of the weights."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lars.optim.steps.descend import replace_by
from lars.optim.steps.tensors import by_kind, pick


class MovingAverage(AveragedModel):
    """torch's average of a network, with an update that the device can switch off."""

    @torch.no_grad()
    def update_unless(self, found_inf: Tensor, model: nn.Module) -> None:
        """Do the same as `update_parameters`, but change no bit if a 0-dim tensor on the device is 1.

        The host reads nothing back. The average must have been updated before.
        """
        averages, values = (
            [tensor.detach() for tensor in chain(network.parameters(), network.buffers())]
            for network in (self.module, model)
        )
        assert self.multi_avg_fn is not None
        for which in by_kind(averages).values():
            old, new = pick(averages, which), [averages[i].clone() for i in which]
            self.multi_avg_fn(new, pick(values, which), self.n_averaged)
            replace_by(old, new, found_inf)
        self.n_averaged += found_inf == 0


def moving_average(model: nn.Module, decay: float, *, warmup: bool = True) -> MovingAverage:
    """An exponential moving average of weights and statistics: a <- d * a + (1 - d) * w per step.

    With `warmup`, d is the smaller of `decay` and (1 + n) / (10 + n) after n updates. Otherwise the average of a short
    run would stay close to the initial weights.
    """
    # `MovingAverage.update_unless` counts the updates on the device of the network.
    device = next(model.parameters()).device
    if not warmup:
        return MovingAverage(
            model, device, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
        )

    @torch.no_grad()
    def update(averages: Any, values: Any, updates: Any) -> None:
        if not averages[0].is_floating_point():  # counters
            torch._foreach_copy_(averages, values)
            return
        # A tensor on the device, so the host does not wait.
        share = 1 - ((1 + updates) / (10 + updates)).clamp(max=decay)
        changes = torch._foreach_sub(values, averages)
        torch._foreach_mul_(changes, share.to(changes[0]))
        torch._foreach_add_(averages, changes)

    return MovingAverage(model, device, multi_avg_fn=update, use_buffers=True)
