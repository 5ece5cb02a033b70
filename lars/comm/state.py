"""Broadcasting a checkpoint to all ranks: a tree of plain values and tensors of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lars.comm.world import World

# MPI counts elements with 31 bits.
_CHUNK_BYTES = 1 << 28


class _Slot(NamedTuple):
    """The place of a tensor in the tree."""

    number: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def broadcast_state(state: Any, world: World) -> Any:
    """Broadcast the root's tree of dicts, lists, tuples, plain values and CPU tensors.

    Tensors keep their strides. They are sent as raw bytes in chunks, because pickling a large checkpoint as one object
    is slow and exceeds MPI's largest message.
    """
    if world.size == 1:
        return state
    tensors: list[Tensor] = []

    def take(tensor: Tensor) -> _Slot:
        tensors.append(tensor if _is_dense(tensor) else tensor.contiguous())
        kept = tensors[-1]
        return _Slot(len(tensors) - 1, kept.shape, kept.stride(), kept.dtype)

    skeleton = world.broadcast_object(_mapped(state, Tensor, take), "state")
    if not world.is_root:
        _mapped(skeleton, _Slot, lambda slot: tensors.append(_empty(slot)))
    world.broadcast(
        {
            f"state.{number}.{place}": chunk
            for number, tensor in enumerate(tensors)
            for place, chunk in enumerate(_bytes_of(tensor).split(_CHUNK_BYTES))
            if len(chunk)
        }
    )
    return _mapped(skeleton, _Slot, lambda slot: tensors[slot.number])


def _mapped(tree: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A copy of the tree in which `change` has replaced every leaf of type `kind`. The order is fixed."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, dict):
        copy = type(tree)((key, _mapped(value, kind, change)) for key, value in tree.items())
        if hasattr(
            tree, "_metadata"
        ):  # versions of the modules, which torch keeps beside a state_dict
            copy._metadata = tree._metadata  # type: ignore[attr-defined]
        return copy
    if isinstance(tree, list) or type(tree) is tuple:
        return type(tree)(_mapped(value, kind, change) for value in tree)
    return tree


def _empty(slot: _Slot) -> Tensor:
    return torch.empty_strided(slot.shape, slot.stride, dtype=slot.dtype)


def _bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor as a vector of bytes."""
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order of dimensions."""
    return torch.empty_like(tensor).stride() == tensor.stride()
