"""One optimizer step: forward and backward passes, the exchange of gradients, the update."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lars.comm.gradients import LocalGradients
from lars.comm.world import World
from lars.learner.forward import Forward
from lars.learner.imported import set_training
from lars.learner.metrics import Metrics
from lars.learner.task import Batch, Task


class StepResult(NamedTuple):
    """The result of a step, which is the same on all ranks except for the times.

    Attributes:
        taken: Whether the weights were updated.
        stop: Whether a rank has been asked to stop.
        save: Whether the root has requested a checkpoint.
        nonfinite: Whether the step was skipped because its loss or a gradient is not finite.
        cause: Why the step was skipped.
        samples: Samples of the step over all ranks.
        seconds: Duration of the step on this rank, including the wait for data.
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


class _TimedIterator:
    """An iterator that measures how long its user waits for items.

    Attributes:
        seconds: The total time of all calls of `next` so far.
    """

    def __init__(self, items: Iterable[Batch]) -> None:
        self.items = iter(items)
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - began


class Learner(Forward):
    """A network that takes optimizer steps."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        gradients: LocalGradients,
        task: Task,
        *,
        lr_at: Callable[[int], float],
        clip_grad_norm: float | None = None,
        amp: str = "off",
        average: AveragedModel | None = None,
        forward_is_collective: bool = False,
        reseed: Callable[[int, int], None] = lambda step, micro_batch: None,
        augment: Callable[[Batch, int, int], Batch] = lambda batch, step, micro_batch: batch,
    ) -> None:
        """Assemble the parts.

        Args:
            model: The network.
            optimizer: Its optimizer. The learning rate of every group is set before every step: `lr_at`, times the
                group's ``lr_scale`` if it has one.
            gradients: The gradients and their exchange between the ranks.
            task: The loss, the metrics, and what a batch is.
            lr_at: Learning rate as a function of the optimizer step, from 0.
            clip_grad_norm: Largest norm of a step's gradient; larger ones are clipped after the exchange.
            amp: Type that torch.autocast uses in the forward pass: off, bf16 or fp16.
            average: Moving average of the weights; see `moving_average`.
            forward_is_collective: Whether the ranks communicate in every forward pass, so that no rank may skip one.
            reseed: Called with (step, number of this rank's micro-batch) before each forward pass.
            augment: Called with a micro-batch and the same two numbers. Returns the micro-batch to train on.
        """
        super().__init__(task, next(model.parameters()).device, amp)
        self.model, self.optimizer, self.gradients = model, optimizer, gradients
        self.lr_at, self.reseed, self.clip_grad_norm = lr_at, reseed, clip_grad_norm
        self.average, self.forward_is_collective = average, forward_is_collective
        self.augment = augment
        self.metrics = Metrics(task.scales, self.device)
        # Only fp16 has such a narrow range that the loss must be scaled.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        # The scaler creates its scale on first use. A rank without readable images might unscale before that.
        self.scaler.scale(torch.zeros((), device=self.device))
        set_training(optimizer, True)

    def networks(self) -> dict[str, nn.Module]:
        """The networks to validate, by the name of their split: the trained network, and its moving average."""
        networks = {"val": self.model}
        if self.average is not None:
            networks["val_ema"] = self.average.module
        return networks

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Give the networks the weights for an evaluation, within a with block.

        An optimizer with two modes, such as those of schedulefree, trains other weights than those to evaluate.
        Afterwards the weights have the same bits as before, so that a run does not depend on its validations.
        """
        modal = callable(getattr(self.optimizer, "eval", None))
        kept = [p.detach().clone() for p in self.model.parameters()] if modal else []
        set_training(self.optimizer, False)
        try:
            yield
        finally:
            set_training(self.optimizer, True)
            for parameter, before in zip(self.model.parameters(), kept, strict=False):
                parameter.data.copy_(before)

    def step(
        self,
        batches: Iterable[Batch],
        step: int,
        *,
        count: int,
        samples: int,
        stop: bool = False,
        save: bool = False,
    ) -> StepResult:
        """Take one optimizer step. The gradient is the mean over the samples of all ranks and is exchanged once.

        Args:
            batches: This rank's micro-batches, already prepared. `count` of them are taken. A micro-batch may be empty
                so that all ranks take the same number.
            step: Number of this optimizer step in the run, from 0.
            count: Micro-batches of this rank in this step.
            samples: Samples of this step over all ranks and micro-batches.
            stop: Whether to inform all ranks that this rank was asked to stop.
            save: Whether to inform all ranks that a checkpoint is due.

        Returns:
            The result, which is the same on every rank except for the time. Computing it is the only point in a step
            where the host waits for the device.
        """
        began = time.perf_counter()
        self.gradients.zero()
        totals_before = self.metrics.totals.clone()
        timed = _TimedIterator(itertools.islice(batches, count))
        nonfinite, samples_read = self._accumulate(timed, step, count, samples)
        notices = self.gradients.notices
        notices[0] = nonfinite
        notices[1], notices[2], notices[3] = float(stop), float(save), float(samples_read)
        computed = time.perf_counter()
        self.gradients.finish_exchange()
        exchanged = time.perf_counter()
        result = self._update(step, samples)
        if not result.taken:
            self.metrics.totals.copy_(totals_before)
        return result._replace(
            samples=samples,
            seconds=time.perf_counter() - began,
            data_seconds=timed.seconds,
            exchange_seconds=exchanged - computed,
        )

    def _accumulate(
        self, batches: Iterable[Batch], step: int, count: int, samples: int
    ) -> tuple[Tensor, int]:
        """Run the forward and backward passes of a step, and start the exchange of the gradients.

        Returns:
            How many losses of this rank are not finite, on the device, and how many samples this rank has read.
        """
        nonfinite = torch.zeros((), device=self.device)
        arrived = samples_read = 0
        for arrived, batch in enumerate(batches, start=1):
            if arrived == count:
                self.gradients.begin_exchange()
            mine = self.task.samples_in(batch)
            if mine == 0 and not self.forward_is_collective:
                continue
            self.reseed(step, arrived - 1)
            samples_read += mine
            batch = self.augment(batch, step, arrived - 1)
            loss = self.forward(batch, self.model, self.metrics)
            nonfinite += ~loss.detach().isfinite()
            # Every sample of the step weighs 1 / samples, whatever its micro-batch and rank.
            self.scaler.scale(loss / samples).backward()
        if arrived != count:
            raise RuntimeError(
                f"the loader delivered {arrived} of the {count} micro-batches of step {step}"
            )
        return nonfinite, samples_read

    def _update(self, step: int, samples: int) -> StepResult:
        """Update the weights with the exchanged gradients, unless the loss or a gradient is not finite."""
        grads = [p.grad for p in self.gradients.parameters if p.grad is not None]
        if grads:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm(grads).to(self.device)
        total, nonfinite, stop, save, samples_read = torch.cat(
            [norm[None].double(), self.gradients.notices.double()]
        ).tolist()
        if not (math.isfinite(total) and nonfinite == 0 and samples_read > 0):
            skipped = self._skip(bool(grads), nonfinite > 0, samples_read > 0)
            return skipped._replace(stop=stop > 0, save=save > 0, grad_norm=total)
        if samples_read != samples:  # some images were unreadable: take the mean over the others
            for grad in [*grads, norm]:
                grad.mul_(samples / samples_read)
        if self.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.gradients.parameters, self.clip_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(step) * group.get("lr_scale", 1.0)
        self.scaler.step(self.optimizer)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.scaler.update()
        total *= samples / samples_read
        return StepResult(taken=True, stop=stop > 0, save=save > 0, grad_norm=total)

    def _skip(self, has_grads: bool, loss_nonfinite: bool, has_samples: bool) -> StepResult:
        """Skip the update: adapt the loss scale and find the cause."""
        scale = self.scaler.get_scale()
        if has_grads:
            self.scaler.update()
        skipped = StepResult(taken=False, stop=False, save=False)
        if not has_samples:
            return skipped._replace(cause="none of its images could be read")
        if not loss_nonfinite and 1 <= self.scaler.get_scale() < scale:
            cause = f"the fp16 loss scale was too large; it is now {self.scaler.get_scale():g}"
            return skipped._replace(cause=cause)
        cause = f"not finite, first in {self.nonfinite_layer()}"
        return skipped._replace(nonfinite=True, cause=cause)

    def nonfinite_layer(self) -> str:
        """Name of the first parameter, in the order of the backward pass, whose gradient is not finite."""
        for name, parameter in reversed(list(self.model.named_parameters())):
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return name
        return "the loss"

    def state_dict(self) -> dict[str, Any]:
        """The state of the network, the optimizer and the exchange, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "gradients": self.gradients.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.gradients.load_state_dict(state["gradients"])
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])
        elif self.average is not None:  # a branch that begins to average
            self.average.module.load_state_dict(state["model"])

    def peak_memory(self) -> int | None:
        """The most memory in bytes that torch has used on this rank's GPU so far. None on a CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device)

    def local_buffers(self) -> list[Tensor]:
        """BatchNorm's running statistics, which differ between the ranks until the end of an epoch."""
        averaged = [] if self.average is None else self.average.module.buffers()
        return [*self.model.buffers(), *averaged]

    def average_statistics(self, world: World) -> None:
        """Average BatchNorm's running statistics over the ranks."""
        world.average_buffers(self.local_buffers())


def moving_average(model: nn.Module, decay: float, *, warmup: bool = True) -> AveragedModel:
    """An exponential moving average of weights and statistics: a <- d * a + (1 - d) * w per step.

    With `warmup`, d is the smaller of `decay` and (1 + n) / (10 + n) after n updates. Otherwise the average of a short
    run would stay close to the initial weights.
    """
    if not warmup:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

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

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
