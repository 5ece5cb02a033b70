"""A run that was stopped and resumed ends with the weights of one that was not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.sources.noise import Synthetic
from lars.config import Config
from lars.engine import train
from launch.acceptance.budget import Budget
from launch.acceptance.rows import OK, Row, failed

_STEPS, _STOP, _BATCH = 6, 3, 16


def run(budget: Budget) -> Iterator[Row]:
    """Train straight twice, and once in two halves. Compare the last checkpoints."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for deterministic products of matrices
    torch.use_deterministic_algorithms(True, warn_only=True)
    straight = trained(budget.folder, "straight")
    again = trained(budget.folder, "again")
    trained(budget.folder, "halves", stop=_STOP)
    yield verdict(straight, again, trained(budget.folder, "halves"))


def trained(folder: Path, name: str, stop: int | None = None) -> dict[str, Tensor]:
    """Run the trainer, or go on with a run, and return the tensors of the last checkpoint."""
    on_gpu = torch.cuda.is_available()
    config = Config(
        model="resnet18",
        small_stem=True,
        base_op="lars",
        base_lr=0.1,
        batch_size=_BATCH,
        epochs=1,
        amp="bf16" if on_gpu else "off",
        workers=0,
        max_steps=stop,
        log_dir=str(folder),
        run_name=name,
    )
    train(config, Synthetic(image_size=32, num_classes=10, train_size=_STEPS * _BATCH, val_size=8))
    newest = max((folder / name).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime_ns)
    return dict(tensors(torch.load(newest, map_location="cpu", weights_only=True)["learner"]))


def tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dictionaries and lists, with their places."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from tensors(value, f"{name}.{key}")
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from tensors(value, f"{name}.{number}")


def verdict(
    straight: dict[str, Tensor], again: dict[str, Tensor], resumed: dict[str, Tensor]
) -> Row:
    """Equal bytes, or a difference that is not larger than that between two runs that were not stopped."""
    what = f"resume after {_STOP} of {_STEPS} steps"
    if straight.keys() != resumed.keys():
        return failed(what, "the checkpoints have different entries")
    usual, found = largest_difference(straight, again), largest_difference(straight, resumed)
    if found == 0:
        return Row(what, OK, 0.0, "relative", note="all bytes are equal")
    if usual == 0:
        note = f"the weights differ by {found:.1e}, but two runs without a stop are equal"
        return Row(what, "failed", found, "relative", high=0.0, note=note)
    note = f"kernels are not deterministic here: two runs without a stop differ by {usual:.1e}"
    return Row(what, OK if found <= 10 * usual else "failed", found, "relative", note=note)


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest difference of two tensors, relative to the norm of the first. 0 means equal bytes."""
    largest = 0.0
    for name, tensor in first.items():
        other = second[name]
        if not torch.equal(tensor, other):
            norm = float(tensor.double().norm()) or 1.0
            largest = max(largest, float((tensor.double() - other.double()).norm()) / norm)
    return largest
