"""What every step does to every layer: norms, trust ratios and relative updates, and which layer diverges first.

A reading costs a copy of the weights and a few norms on the device, and one copy to the host. Nothing else happens in
the steps between two readings, and training is the same to the last bit with and without readings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lars.learner.learner import StepResult
from lars.observe import layer_range
from lars.observe.layer_file import QUANTITIES, LayerFile, LayerHistory, read
from lars.observe.observer import Observer, Training
from lars.observe.output import say
from lars.optim.base import LayerwiseOptimizer
from lars.optim.steps.tensors import Tensors, by_kind, factor_dtype, pick

__all__ = ["LayerHistory", "LayerProbe", "Layers", "read"]

# Every tenth reading is also drawn as histograms.
HISTOGRAM_EVERY = 10
# The loss is reported if it exceeds this multiple of its start.
FAR_ABOVE = 3.0


def reads_layers(every: int, step: int) -> bool:
    """Whether --layers-every `every` reads the layers in a step, counted from 1. 0: in no step."""
    if every == 0:
        return False
    return step % every == 0 or (step < every and step & (step - 1) == 0)


class Layers(Observer):
    """Reads every layer each --layers-every steps, and names the layer that caused a divergence.

    The steps 1, 2, 4, 8 and so on up to the first of these are read too, because a run may diverge in its first steps.
    The values go to the run folder (see `lars.observe.layer_file`) and to TensorBoard.
    """

    def __init__(self, training: Training) -> None:
        """Observe `training`. Nothing is read yet."""
        super().__init__(training)
        self.every = training.config.layers_every
        self.probe = LayerProbe(training.learner.optimizer, training.learner.model)
        self.file = LayerFile(training.run.folder, self.probe.layers, self.probe.kinds)
        self.readings: deque[tuple[int, np.ndarray]] = deque(maxlen=layer_range.READINGS)
        rows = training.progress.history
        self.first_loss: float | None = rows[0]["loss"] if rows else None
        self.is_far_above = False

    def start(self) -> None:
        """Keep the readings up to the checkpoint, and measure from now on."""
        if self.every == 0:
            return
        progress = self.training.progress
        history = self.file.restart(progress.step)
        if history is not None:
            self.readings.extend(zip(history.steps.tolist(), history.values, strict=True))
            if self.readings[-1][0] >= self.training.curves.first_step:
                self._draw(*self.readings[-1])
        learner = self.training.learner
        self.probe.watch(lambda: reads_layers(self.every, learner.launched + 1))

    def step(self, result: StepResult) -> None:
        """Write the values of the step, and explain a divergence."""
        progress = self.training.progress
        # The device may have launched the next step already, which is not read.
        values = self.probe.take() if reads_layers(self.every, progress.step) else None
        if values is not None and result.taken:
            self.file.add(progress.step, values)
            self._draw(progress.step, values)
            self.readings.append((progress.step, values))
        if result.nonfinite and progress.skipped_in_a_row == 1:
            self._explain("before the skipped step")
        self._check_loss(progress.new_reading().get("loss"))

    def _draw(self, step: int, values: np.ndarray) -> None:
        """Draw the smallest, median and largest value over the adapted layers, and sometimes histograms."""
        curves, numbers = {}, torch.from_numpy(values)[:, self.probe.is_adapted]
        finite = {
            f"layers/{name}": row[row.isfinite()]
            for name, row in zip(QUANTITIES, numbers, strict=True)
        }
        drawn = {name: row for name, row in finite.items() if len(row)}
        for name, row in drawn.items():
            for statistic in ("min", "median", "max"):
                curves[f"{name}/{statistic}"] = getattr(row, statistic)().item()
        self.training.curves.scalars(curves, step)
        if step % (self.every * HISTOGRAM_EVERY) == 0:
            self.training.curves.histograms(drawn, step)

    def _check_loss(self, loss: float | None) -> None:
        """Explain a training loss that is far above its start, once until it has come down again."""
        if loss is None:
            return
        if self.first_loss is None:
            self.first_loss = loss
        was, self.is_far_above = self.is_far_above, loss > FAR_ABOVE * self.first_loss
        if self.is_far_above and not was:
            self._explain(f"the loss is {loss:.4g}, and it began at {self.first_loss:.4g}")

    def _explain(self, occasion: str) -> None:
        if not self.readings:
            return
        steps, values = (np.stack(column) for column in zip(*self.readings, strict=True))
        probe = self.probe
        history = LayerHistory(steps, probe.layers, probe.kinds, values)
        rates = np.array([self.training.learner.lr_at(step - 1) for step in steps.tolist()])
        text = layer_range.explanation(history, rates, probe.are_matrices)
        say(f"warning: {occasion}: {text}")
        self.training.progress.note(f"{occasion}: {text}")

    def end(self) -> None:
        """Convert the readings to a Parquet file."""
        if self.every:
            self.file.finish()


class LayerProbe:
    """Measures what the steps of an optimizer do to each parameter.

    Attributes:
        layers: Names of the optimizer's parameters, in the order of the network.
        kinds: "adapted", or "excluded" for the parameters of a group with ``adapt=False``.
        is_adapted: The same as a bool tensor. All are True if none is adapted.
        are_matrices: Which parameters have more than one dimension, a bool array.
    """

    def __init__(self, optimizer: Optimizer, model: torch.nn.Module) -> None:
        """Prepare to measure the steps of `optimizer`, which updates parameters of `model`."""
        self.optimizer = optimizer
        adapted = {p: g.get("adapt", True) for g in optimizer.param_groups for p in g["params"]}
        named = {p: name for name, p in model.named_parameters() if p in adapted}
        self.place: dict[Tensor, int] = {p: place for place, p in enumerate(named)}
        self.layers = list(named.values())
        self.kinds = ["adapted" if adapted[p] else "excluded" for p in named]
        self.is_adapted = torch.tensor([adapted[p] for p in named] or [True])
        if not self.is_adapted.any():
            self.is_adapted[:] = True
        self.are_matrices = np.array([p.ndim > 1 for p in named], bool)
        self.weights: list[Tensors] = []
        self.measured: tuple[list[int], Tensor] | None = None

    def watch(self, is_read: Callable[[], bool]) -> None:
        """Measure the steps for which ``is_read()``, called before the step, is true."""

        def before(*_: Any) -> None:
            if is_read():
                self.weights = [[p.detach().clone() for p in params] for _, params in self._parts()]

        def after(*_: Any) -> None:
            if self.weights:
                self.measured = self._measure()
                self.weights = []

        self.optimizer.register_step_pre_hook(before)
        self.optimizer.register_step_post_hook(after)

    def take(self) -> np.ndarray | None:
        """The values of the last step, of shape (quantities, layers), read from the device once.

        None if the step was not measured. Values of a parameter without a gradient are nan.
        """
        if self.measured is None:
            return None
        places, numbers = self.measured
        self.measured = None
        values = np.full((len(QUANTITIES), len(self.layers)), np.nan, np.float32)
        values[:, places] = numbers.cpu().numpy()
        return values

    def _parts(self) -> Iterator[tuple[dict[str, Any], Tensors]]:
        """Each group, with those of its parameters that have a gradient and share a device and dtype."""
        for group in self.optimizer.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p in self.place]
            for which in by_kind(params).values() if params else ():
                yield group, pick(params, which)

    @torch.no_grad()
    def _measure(self) -> tuple[list[int], Tensor]:
        """The places of the measured layers, and their values of shape (quantities, layers) on the device."""
        places, columns = [], []
        for (group, params), weights in zip(self._parts(), self.weights, strict=True):
            places += [self.place[p] for p in params]
            weight_norms, grad_norms = _norms(weights), _norms([p.grad for p in params])
            ratios = _ratios(self.optimizer, group, params, weights)
            torch._foreach_sub_(weights, params)
            columns.append(
                torch.stack(
                    [weight_norms, grad_norms, ratios.float(), _norms(weights) / weight_norms]
                )
            )
        return places, torch.cat([column.to(columns[0].device) for column in columns], dim=1)


def _norms(tensors: list[Any]) -> Tensor:
    """L2 norms as a float32 vector."""
    return torch.stack(torch._foreach_norm(tensors, dtype=factor_dtype(tensors[0]))).float()


def _ratios(
    optimizer: Optimizer, group: dict[str, Any], params: Tensors, weights: Tensors
) -> Tensor:
    """What multiplied the updates: 1 for torch's optimizers, nan for those that do not provide it."""
    if isinstance(optimizer, LayerwiseOptimizer):
        return optimizer.last_ratios(group, params, weights)
    is_torch = type(optimizer).__module__.startswith("torch.optim")
    return torch.full((len(params),), 1.0 if is_torch else np.nan, device=weights[0].device)
