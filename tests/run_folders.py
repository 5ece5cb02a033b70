"""Reading and comparing run folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lars.run import checkpoint


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without the values that depend on the speed of the machine."""
    return [
        {k: v for k, v in row.items() if k != "images_per_second" and not k.endswith("seconds")}
        for row in rows
    ]


def end_of(folder: Path) -> tuple[str, list[dict]]:
    """The hash of the final weights, and all metrics."""
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return weights, without_times(rows(folder))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves as it shows them, without the speed."""
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    board.Reload()
    return {
        tag: [(e.step, e.value) for e in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
        if "per_second" not in tag
    }


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """All tensors in a tree of dicts and lists."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(part)


def same_end(folder: Path, other: Path, *, epochs: int = 3) -> None:
    """Check that weights, statistics, momentum, metrics and curves are equal to the last bit."""
    name = f"checkpoint-{epochs}.pth.tar"
    ours, theirs = (checkpoint.load(f / name) for f in (folder, other))
    pairs = list(zip(tensors(ours["learner"]), tensors(theirs["learner"]), strict=True))
    assert len(pairs) > 100
    for one, two in pairs:
        assert torch.equal(one, two)
    assert without_times(rows(folder)) == without_times(rows(other))
    assert scalars(folder) == scalars(other)
