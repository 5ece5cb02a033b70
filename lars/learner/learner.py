"""One optimizer step: forward and backward passes, the exchange of gradients, the update."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lars.comm.gradients import LocalGradients
from lars.comm.world import World
from lars.learner.average import MovingAverage
from lars.learner.forward import Forward
from lars.learner.imported import set_training
from lars.learner.mailbox import Launched, Mailbox, Times, copied_to_host
from lars.learner.metrics import Metrics
from lars.learner.result import Notice, StepResult
from lars.learner.task import Batch, Task
from lars.learner.timing import TimedIterator
from lars.optim.base import step_unless, takes_found_inf

__all__ = ["Learner", "StepResult"]


class Learner(Forward):
    """A network that takes optimizer steps.

    Attributes:
        launched: Number of the step that was launched last, from 0. Its result may not be known yet.
    """

    launched = -1

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
        average: MovingAverage | None = None,
        forward_is_collective: bool = False,
        reseed: Callable[[int, int], None] = lambda step, micro_batch: None,
        augment: Callable[[Batch, int, int], Batch] = lambda batch, step, micro_batch: batch,
        ahead: bool | None = None,
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
            ahead: Whether the host launches a step before it knows the result of the step before. The device then
                decides whether a step is skipped. All ranks must choose the same. None: on a GPU, if the optimizer
                takes ``found_inf``.
        """
        super().__init__(task, next(model.parameters()).device, amp)
        self.model, self.optimizer, self.gradients = model, optimizer, gradients
        self.lr_at, self.reseed, self.clip_grad_norm = lr_at, reseed, clip_grad_norm
        self.average, self.forward_is_collective = average, forward_is_collective
        self.augment = augment
        on_gpu = self.device.type == "cuda"
        self.ahead = on_gpu and takes_found_inf(optimizer) if ahead is None else ahead
        self.has_taken_steps = False
        self.mailbox = Mailbox()
        self.names = {parameter: name for name, parameter in model.named_parameters()}
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
        """Take one optimizer step, and wait for its result. The arguments are those of `launch`."""
        return self.launch(batches, step, count=count, samples=samples, stop=stop, save=save)[-1]

    def launch(
        self,
        batches: Iterable[Batch],
        step: int,
        *,
        count: int,
        samples: int,
        stop: bool = False,
        save: bool = False,
        settle: bool = True,
    ) -> list[StepResult]:
        """Take one optimizer step. The gradient is the mean over the samples of all ranks and is exchanged once.

        If the host works `ahead`, it does not wait for the device to finish the step. It waits for the step before.

        Args:
            batches: This rank's micro-batches, already prepared. `count` of them are taken. A micro-batch may be empty
                so that all ranks take the same number.
            step: Number of this optimizer step in the run, from 0.
            count: Micro-batches of this rank in this step.
            samples: Samples of this step over all ranks and micro-batches.
            stop: Whether to inform all ranks that this rank was asked to stop.
            save: Whether to inform all ranks that a checkpoint is due.
            settle: Whether to wait for this step, the same on all ranks. Set it before anything reads the network, the
                optimizer or the metrics.

        Returns:
            The results that are new, in the order of the steps. They are the same on every rank except for the times.
            The result of this step is the last one, or it is in the list that the next call returns.
        """
        began = time.perf_counter()
        self.launched = step
        self.gradients.zero()
        totals_before = self.metrics.totals.clone()
        timed = TimedIterator(itertools.islice(batches, count))
        nonfinite, samples_read = self._accumulate(timed, step, count, samples)
        notices = self.gradients.notices
        notices[0] = nonfinite
        for place, value in enumerate((stop, save, samples_read), start=1):
            notices[place].fill_(float(value))
        computed = time.perf_counter()
        self.gradients.finish_exchange()
        exchanged = time.perf_counter()
        newest = self._update(step, samples)
        self.metrics.undo(totals_before, newest.skipped)
        self.has_taken_steps |= newest.skipped is False
        results = self.mailbox.collect(newest, settle=settle)
        seconds = time.perf_counter() - began
        newest.times = Times(seconds, timed.seconds, exchanged - computed)
        return [launched.timed(result) for launched, result in results]

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

    def _update(self, step: int, samples: int) -> Launched:
        """Update the weights with the exchanged gradients, unless the loss or a gradient is not finite.

        The first step that a learner takes creates the state of the optimizer. The host waits for it.
        """
        parameters = [p for p in self.gradients.parameters if p.grad is not None]
        grads = [p.grad for p in parameters if p.grad is not None]
        if grads:
            self.scaler.unscale_(self.optimizer)
        norm, place = _norm_and_place(grads, self.device)
        numbers = torch.cat([torch.stack([norm, place]).double(), self.gradients.notices.double()])
        read: Callable[[], list[float]]
        skipped: bool | Tensor
        if self.ahead and self.has_taken_steps and grads:
            skipped = self._skips(norm)
            scales = self._update_ahead(step, samples, grads, norm, skipped)
            read = copied_to_host(torch.cat([numbers, scales]))
        else:
            notice = self._update_now(step, samples, grads, norm, Notice(*numbers.tolist()))
            skipped, read = not notice.is_usable, partial(list, notice)
        return Launched(read, samples, [self.names[p] for p in parameters], skipped)

    def _update_now(
        self, step: int, samples: int, grads: list[Tensor], norm: Tensor, notice: Notice
    ) -> Notice:
        """Update the weights if the host finds that the gradients are usable. Return the complete notice."""
        scale = 1.0
        if notice.is_usable:
            if notice.samples_read != samples:  # the gradient is the mean over the others
                for grad in [*grads, norm]:
                    grad.mul_(samples / notice.samples_read)
            self._clip_and_set_rate(step, norm)
            self.scaler.step(self.optimizer)
            if self.average is not None:
                self.average.update_parameters(self.model)
        else:
            scale = self.scaler.get_scale()
        if grads:
            self.scaler.update()
        if notice.is_usable:
            return notice
        return notice._replace(scale=scale, next_scale=self.scaler.get_scale())

    def _skips(self, norm: Tensor) -> Tensor:
        """1 if the step must not change anything, else 0, as a float32 tensor on the device."""
        nonfinite, _, _, samples_read = self.gradients.notices.unbind()
        return (~norm.isfinite() | (nonfinite > 0) | (samples_read == 0)).float()

    def _update_ahead(
        self, step: int, samples: int, grads: list[Tensor], norm: Tensor, found_inf: Tensor
    ) -> Tensor:
        """Do the same as `_update_now`, but let the device decide with `found_inf`. The host reads nothing.

        Returns:
            The fp16 loss scale before and after the step, as a vector on the device.
        """
        one = torch.ones(1, dtype=torch.float64, device=self.device)
        scale = self.scaler.scale(one)
        # If all images were readable, this multiplies by 1.
        share = samples / self.gradients.notices[3].double()
        torch._foreach_mul_(grads, share.to(grads[0].dtype))
        self._clip_and_set_rate(step, norm * share.to(norm.dtype))
        step_unless(found_inf, self.optimizer)
        if self.average is not None:
            self.average.update_unless(found_inf, self.model)
        self.scaler.update()
        return torch.cat([scale, self.scaler.scale(one)])

    def _clip_and_set_rate(self, step: int, norm: Tensor) -> None:
        """Clip the gradients, whose norm is `norm`, and set the learning rate of the step."""
        if self.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.gradients.parameters, self.clip_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(step) * group.get("lr_scale", 1.0)

    def state_dict(self) -> dict[str, Any]:
        """The state of the network, the optimizer and the exchange, as tensors and plain values.

        Raises:
            RuntimeError: The result of a step has not been delivered; see `launch`.
        """
        if self.mailbox.waiting:
            raise RuntimeError("the last step is not settled: launch it with settle=True")
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "gradients": self.gradients.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.has_taken_steps = False
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


def _norm_and_place(grads: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """The L2 norm of all gradients, and the `lars.learner.result.Notice.place` of the one that is not finite."""
    if not grads:
        zero = torch.zeros((), device=device)
        return zero, zero
    norms = torch.stack(torch._foreach_norm(grads))
    places = torch.arange(1, len(grads) + 1, device=device)
    return torch.linalg.vector_norm(norms), (~norms.isfinite() * places).amax().to(norms.dtype)
