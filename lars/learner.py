"""What learns: a network, its optimizer, and the exchange of gradients between them; one step of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lars.gradients import LocalGradients
from lars.metrics import Sums

Batch = tuple[Tensor, Tensor]

AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Notice(NamedTuple):
    """What all ranks know after a step.

    Attributes:
        taken: Whether the step was taken.
        stop: Whether a rank has been asked to stop.
        save: Whether the root wants a checkpoint.
        broken: Whether it was left out because its loss or gradients are not finite.
        cause: Why it was left out.
    """

    taken: bool
    stop: bool
    save: bool
    broken: bool = False
    cause: str = ""


class Learner:
    """A network that takes optimizer steps."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        gradients: LocalGradients,
        *,
        lr_at: Callable[[int], float],
        label_smoothing: float = 0.0,
        clip_grad_norm: float | None = None,
        amp: str = "off",
        average: AveragedModel | None = None,
        in_step: bool = False,
        reseed: Callable[[int, int], None] = lambda step, micro_batch: None,
    ) -> None:
        """Put the parts together.

        Args:
            model: The network.
            optimizer: Its optimizer; its learning rate is set before every step.
            gradients: The exchange over the ranks.
            lr_at: Learning rate as a function of the optimizer step, from 0.
            label_smoothing: As torch.nn.functional.cross_entropy has it.
            clip_grad_norm: Greatest norm of a step's gradient, taken after the exchange.
            amp: Type of the forward pass where autocast thinks it safe: off, bf16 or fp16.
            average: Moving average of the weights, see `moving_average`.
            in_step: Whether the ranks meet in every forward pass, so that none may be left out.
            reseed: Called with (step, number of this rank's micro-batch) before each forward pass.
        """
        self.model, self.optimizer, self.gradients = model, optimizer, gradients
        self.lr_at, self.label_smoothing, self.reseed = lr_at, label_smoothing, reseed
        self.clip_grad_norm, self.average, self.in_step = clip_grad_norm, average, in_step
        self.device = next(model.parameters()).device
        self.amp_type = AMP_TYPES[amp]
        # Only fp16's range is so narrow that the loss has to be scaled.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        # It makes its scale when it is first used, and a rank without readable images may have to unscale first.
        self.scaler.scale(torch.zeros((), device=self.device))

    @property
    def judged(self) -> nn.Module:
        """The network that is validated: the average, if there is one."""
        return self.model if self.average is None else self.average.module

    def step(
        self,
        micro_batches: Iterable[Batch],
        *,
        step: int,
        count: int,
        samples: int,
        sums: Sums,
        stop: bool = False,
        save: bool = False,
    ) -> Notice:
        """Take one optimizer step: the gradient is the mean over all samples of all ranks, exchanged once.

        Args:
            micro_batches: This rank's (images, labels), one after another; one without images only keeps step.
            step: Number of this optimizer step in the run, from 0.
            count: Micro-batches to come.
            samples: Samples of this step over all ranks and micro-batches.
            sums: Takes this rank's losses and hits, if the step is taken.
            stop: Tell all ranks that this one has been asked to stop.
            save: Tell all ranks that a checkpoint is wanted.

        Returns:
            The same on every rank. Reading it is the one time in a step that the host waits for the device.
        """
        self.gradients.zero()
        counted = sums.totals.clone()
        broken = torch.zeros((), device=self.device)
        arrived = images_read = 0
        for arrived, (images, labels) in enumerate(micro_batches, start=1):
            if arrived == count:
                self.gradients.begin_exchange()
            if len(labels) == 0 and not self.in_step:
                continue
            self.reseed(step, arrived - 1)
            images_read += len(labels)
            loss = self.forward(images, labels, sums)
            broken += ~loss.detach().isfinite()
            # Every sample of the step weighs 1 / samples, in whichever micro-batch and on whichever rank it is.
            self.scaler.scale(loss / samples).backward()
        if arrived != count:
            raise RuntimeError(
                f"the loader gave {arrived} of the {count} micro-batches of step {step}"
            )
        notices = self.gradients.notices
        notices[0] = broken
        notices[1], notices[2], notices[3] = float(stop), float(save), float(images_read)
        self.gradients.finish_exchange()
        notice = self._update(step, samples)
        if not notice.taken:
            sums.totals.copy_(counted)
        return notice

    def _update(self, step: int, samples: int) -> Notice:
        """Move the weights by the exchanged gradients, unless something in them is not finite."""
        grads = [p.grad for p in self.gradients.parameters if p.grad is not None]
        if grads:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm(grads).to(self.device)
        total, broken, stop, save, images_read = torch.cat(
            [norm[None].double(), self.gradients.notices.double()]
        ).tolist()
        taken = math.isfinite(total) and broken == 0 and images_read > 0
        if taken:
            if images_read != samples:  # some could not be read: the others weigh the more
                for grad in [*grads, norm]:
                    grad.mul_(samples / images_read)
            if self.clip_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(self.gradients.parameters, self.clip_grad_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr_at(step)
            self.scaler.step(self.optimizer)
            if self.average is not None:
                self.average.update_parameters(self.model)
        if taken:
            self.scaler.update()
            return Notice(taken, stop > 0, save > 0)
        scale = self.scaler.get_scale()
        if grads:
            self.scaler.update()
        if images_read == 0:
            why = False, "none of its images could be read"
        elif broken == 0 and 1 <= self.scaler.get_scale() < scale:
            why = False, f"fp16's loss scale was too large, and is {self.scaler.get_scale():g} now"
        else:
            why = True, f"not finite, first in {self.broken_layer()}"
        return Notice(taken, stop > 0, save > 0, *why)

    def broken_layer(self) -> str:
        """Name of the parameter where the backward pass first met a gradient that is not finite."""
        for name, parameter in reversed(list(self.model.named_parameters())):
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return name
        return "the loss"

    def forward(
        self, images: Tensor, labels: Tensor, sums: Sums, model: nn.Module | None = None
    ) -> Tensor:
        """Sum of the losses of a batch, by `model` or else the one that learns; they are counted in `sums`."""
        with torch.autocast(self.device.type, self.amp_type, enabled=self.amp_type is not None):
            logits = (model or self.model)(images)
            loss = nn.functional.cross_entropy(
                logits, labels, label_smoothing=self.label_smoothing, reduction="sum"
            )
        sums.add(loss, logits, labels)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs of what has been learnt, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "gradients": self.gradients.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.gradients.load_state_dict(state["gradients"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def rank_tensors(self) -> list[Tensor]:
        """What differs between the ranks until the end of an epoch: BatchNorm's running statistics."""
        averaged = [] if self.average is None else self.average.module.buffers()
        return [*self.model.buffers(), *averaged]


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of weights and statistics: a <- decay * a + (1 - decay) * w per step."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
