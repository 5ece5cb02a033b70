"""Export of weights as safetensors files that torchvision's networks can load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from lars.run.files import atomic_write
from lars.run.records import Row


def export_weights(path: Path, model: nn.Module, row: Row | None, classes: Sequence[str]) -> None:
    """Write a network's weights. The metadata entry "description" holds the validation and the class names as JSON.

    Args:
        path: File to write.
        model: The network.
        row: Its last validation, if there was one.
        classes: The class name of each output, if known.

    Raises:
        OSError: The file cannot be written.
    """
    validation = {k: v for k, v in (row or {}).items() if k not in ("images_per_second", "seconds")}
    # A single entry, because safetensors writes several entries in random order, and equal runs must give equal files.
    metadata = {"description": json.dumps({"validation": validation, "classes": list(classes)})}
    state: dict[str, Tensor] = {}
    stored = set()
    for name, tensor in model.state_dict().items():
        shared = tensor.untyped_storage().data_ptr() in stored
        stored.add(tensor.untyped_storage().data_ptr())
        # safetensors refuses tensors that share memory, such as tied layers of a user's network.
        copy = tensor.cpu().contiguous()
        state[name] = copy.clone() if shared else copy
    with atomic_write(path) as file:
        file.write(save(state, metadata))
