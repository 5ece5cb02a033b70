"""The memory that a rank needs, estimated from shapes. No image is read, and nothing is allocated on the device."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lars.learner.learner import Learner
from lars.models.sync_batch_norm import SyncBatchNorm


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank needs during a step. None where the estimate is not possible.

    The list is not complete: a backward pass also needs the gradients of a few activations, and CUDA and its libraries
    need their own memory.

    Attributes:
        weights: Parameters and buffers, such as BatchNorm statistics.
        gradients: Gradients of the parameters.
        optimizer: State of the optimizer, such as momentum.
        average: The moving average of the weights; 0 without one.
        activations: What one micro-batch keeps for its backward pass, including its images.
    """

    weights: int
    gradients: int
    optimizer: int | None
    average: int
    activations: int | None

    @property
    def total(self) -> int:
        """The sum of the known parts."""
        parts = (self.weights, self.gradients, self.optimizer, self.average, self.activations)
        return sum(part or 0 for part in parts)


def memory_of(learner: Learner, images: tuple[int, ...]) -> Memory:
    """Estimate the memory of a rank.

    Args:
        learner: The learner, before or after its first step.
        images: Shape of the images of a micro-batch, (n, 3, height, width).
    """
    model = learner.model
    averaged = [] if learner.average is None else tensors_of(learner.average.module)
    return Memory(
        weights=bytes_of(tensors_of(model)),
        gradients=bytes_of(learner.gradients.parameters),
        optimizer=optimizer_bytes(learner.optimizer),
        average=bytes_of(averaged),
        activations=activation_bytes(model, images, learner.amp_type),
    )


def tensors_of(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a network."""
    return [*model.parameters(), *model.buffers()]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The size of the elements of some tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int | None:
    """The size of an optimizer's state in bytes. None if the optimizer needs values to create its state.

    Most optimizers create their state in the first step. Before it, a copy of the optimizer takes a step on the meta
    device, whose tensors have shapes but no values.
    """
    if not optimizer.state:
        try:
            optimizer = _on_meta(optimizer)
            optimizer.step()
        except (
            Exception
        ):  # any optimizer may be used: it may refuse a copy, and its step may need values
            return None
    return bytes_of(_leaves(list(optimizer.state.values())))


def _on_meta(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A copy of an optimizer without state, whose parameters and gradients are on the meta device."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    meta = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters}
    copied = copy.deepcopy(optimizer, dict(meta))
    for parameter in meta.values():
        parameter.grad = torch.empty_like(parameter)
    for group in copied.param_groups:
        # torch's fused kernels refuse meta tensors. The state does not depend on the kernel.
        if "fused" in group:
            group["fused"] = None
    return copied


def _leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(part)


def activation_bytes(
    model: nn.Module, images: tuple[int, ...], amp_type: torch.dtype | None = None
) -> int | None:
    """The size in bytes of what a forward pass saves for the backward pass, including the images.

    torch's fake tensors run the network on shapes only. Tensors that share memory count once.

    Args:
        model: The network in training mode. It does not change.
        images: Shape of its input.
        amp_type: Type of torch.autocast, if it is used.

    Returns:
        The bytes, or None if the network cannot run on shapes alone.
    """
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    try:
        with FakeTensorMode(), _without_communication(model):
            state = {
                **{
                    n: _like(p).requires_grad_(p.requires_grad) for n, p in model.named_parameters()
                },
                **{name: _like(b) for name, b in model.named_buffers()},
            }
            batch = torch.empty(images).to(memory_format=torch.channels_last)
            with (
                torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
                torch.autocast("cpu", amp_type, enabled=amp_type is not None),
            ):
                output = torch.func.functional_call(model, state, (batch,))
            own = {tensor.untyped_storage()._cdata for tensor in state.values()}
            del output
    except Exception:  # the network may need values, and it may be the user's own
        return None
    return sum(storage.nbytes() for key, storage in saved.items() if key not in own)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


@contextlib.contextmanager
def _without_communication(model: nn.Module) -> Iterator[None]:
    """Let the layers of a network run in this process alone: no collectives, and no compiler."""
    layers = [module for module in model.modules() if isinstance(module, SyncBatchNorm)]
    collectives = [layer.all_reduce for layer in layers]
    compiled = getattr(model, "_compiled_call_impl", None)
    try:
        for layer in layers:
            layer.all_reduce = _alone
        model._compiled_call_impl = None
        yield
    finally:
        model._compiled_call_impl = compiled
        for layer, collective in zip(layers, collectives, strict=True):
            layer.all_reduce = collective


def _alone(tensor: Tensor, name: str) -> Tensor:
    return tensor
