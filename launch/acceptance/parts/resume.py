"""A run that was stopped and resumed ends with the weights of one that was not."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.sources.noise import Synthetic
from lars.comm.world import World
from lars.config import Config
from lars.run import checkpoint
from launch.acceptance import training
from launch.acceptance.budget import Budget
from launch.acceptance.rows import FAILED, OK, Row, failed, not_tested

_STEPS, _STOP, _BATCH = 6, 3, 16
# What the trainer imports besides torch, torchvision and NumPy.
_TRAINER_NEEDS = ("tensorboard", "tqdm", "pyarrow", "safetensors")


def run(budget: Budget) -> Iterator[Row]:
    """Compare the state of a learner, then that of whole runs of the trainer."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for deterministic products of matrices
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield compared("a learner, saved and loaded", lambda name: learnt(budget.folder, name))
    what = "a run of the trainer, stopped and resumed"
    missing = [name for name in _TRAINER_NEEDS if not importlib.util.find_spec(name)]
    if missing:
        yield not_tested(what, f"{missing[0]} is not installed; ./launch/setup.sh")
    else:
        yield compared(what, lambda name: trained(budget.folder, name))


def compared(what: str, final_state: Callable[[str], Any]) -> Row:
    """Train straight and in two halves. If the results differ, train straight again to see how much is usual.

    `final_state` gets "straight", "halves" or "again".
    """
    what = f"{what} after {_STOP} of {_STEPS} steps"
    straight, halves = (dict(tensors(final_state(name))) for name in ("straight", "halves"))
    if straight.keys() != halves.keys():
        return failed(what, "the states have different entries")
    differ = largest_difference(straight, halves) > 0
    again = dict(tensors(final_state("again"))) if differ else straight
    return verdict(what, straight, again, halves)


def learnt(folder: Path, name: str) -> dict[str, Any]:
    """The state of a learner after all steps. "halves": a second learner goes on after half of them."""
    setting = training.ON_CPU._replace(batch_size=_BATCH)
    if torch.cuda.is_available():
        setting = setting._replace(amp="bf16")
    device = training.device_of(World())
    learner = training.make(setting, World(), device)
    for step in range(_STEPS):
        if name == "halves" and step == _STOP:
            path = folder / "state.pth.tar"
            checkpoint.save(path, learner.state_dict())
            learner = training.make(setting, World(), device)
            learner.load_state_dict(checkpoint.load(path))
        batches = training.resident(learner, setting)
        learner.launch(batches, step, count=1, samples=_BATCH)
    return learner.state_dict()


def trained(folder: Path, name: str) -> dict[str, Any]:
    """The state in the last checkpoint of a run of the trainer. "halves": two jobs, each with half of the steps."""
    from lars.engine import train

    config = Config(
        model="resnet18" if torch.cuda.is_available() else "small_cnn",
        base_op="lars",
        base_lr=0.1,
        batch_size=_BATCH,
        epochs=1,
        amp="bf16" if torch.cuda.is_available() else "off",
        workers=0,
        log_dir=str(folder),
        run_name=name,
    )
    source = Synthetic(image_size=28, num_classes=10, train_size=_STEPS * _BATCH, val_size=8)
    if name == "halves":
        train(dataclasses.replace(config, max_steps=_STOP), source)
    train(config, source)
    newest = max((folder / name).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime_ns)
    state: dict[str, Any] = checkpoint.load(newest)["learner"]
    return state


def tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dictionaries and lists, with their places."""
    if isinstance(tree, Tensor):
        yield name, tree.cpu()
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from tensors(value, f"{name}.{key}")
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from tensors(value, f"{name}.{number}")


def verdict(
    what: str, straight: dict[str, Tensor], again: dict[str, Tensor], resumed: dict[str, Tensor]
) -> Row:
    """Equal bytes, or a difference that is not larger than that between two runs that were not stopped."""
    usual, found = largest_difference(straight, again), largest_difference(straight, resumed)
    if found == 0:
        return Row(what, OK, 0.0, "difference", note="all bytes are equal")
    if usual == 0:
        note = "the weights differ, but those of two runs without a stop are equal"
        return Row(what, FAILED, found, "difference", high=0.0, note=note)
    note = f"kernels are not deterministic here: two runs without a stop differ by {usual:.1e}"
    return Row(what, OK if found <= 10 * usual else FAILED, found, "difference", note=note)


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest difference of two tensors, relative to the norm of the first. 0 means equal bytes."""
    largest = 0.0
    for name, tensor in first.items():
        other = second[name]
        if not torch.equal(tensor, other):
            norm = float(tensor.double().norm()) or 1.0
            largest = max(largest, float((tensor.double() - other.double()).norm()) / norm)
    return largest
