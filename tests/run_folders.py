"""Reading and comparing run folders."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lars.observe.layers import read
from lars.run import checkpoint
from lars.run.records import encoded


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary_of(folder: Path) -> dict[str, Any]:
    """The content of summary.json."""
    return json.loads((folder / "summary.json").read_text())


# The accuracies of `row`, which fall once and are nan once.
TOP1 = (10.0, 40.0, 35.0, math.nan, 60.0)


def row(split: str, epoch: int, **more: Any) -> dict[str, Any]:
    """A row of metrics.jsonl: an epoch has 4 steps, and takes 10 s of training and 1 s of validation."""
    values = {"loss": 1 / epoch, "top1": TOP1[epoch - 1], "top5": 90.0, "lr": 0.1}
    seconds = 10.0 if split == "train" else 1.0
    times = {"images_per_second": 100.0, "seconds": seconds}
    return {"split": split, "epoch": epoch, "step": 4 * epoch} | values | times | more


def write_run(folder: Path, rows: list[dict[str, Any]] | None = None, **flags: Any) -> Path:
    """Write the records of a run of five epochs."""
    folder.mkdir(parents=True)
    if rows is None:
        rows = [row(split, epoch) for epoch in range(1, 6) for split in ("train", "val")]
    flags = {"base_op": "lars", "base_lr": 2.0, "epochs": 5, "seed": 42, "log_dir": "x"} | flags
    plan = {"effective_batch_size": 64, "steps_per_epoch": 4}
    (folder / "config.json").write_text(json.dumps({"flags": flags, "plan": plan}))
    (folder / "metrics.jsonl").write_bytes(b"".join(map(encoded, rows)))
    return folder


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


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, with columns that do not depend on the speed of the machine."""
    with open(folder / "metrics.csv", newline="") as file:
        return [
            {
                name: line[name]
                for name in ("epoch", "step", "lr", "train_loss", "test_loss", "test_acc")
            }
            for line in csv.DictReader(file)
        ]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves as it shows them, without those that depend on the speed of the machine."""
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    board.Reload()
    return {
        tag: [(e.step, e.value) for e in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
        if "per_second" not in tag and "data_share" not in tag
    }


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """All tensors in a tree of dicts and lists."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(part)


def same_end(folder: Path, other: Path, *, epochs: int = 3) -> None:
    """Check that weights, statistics, momentum, metrics, curves and values of layers are equal to the last bit."""
    name = f"checkpoint-{epochs}.pth.tar"
    ours, theirs = (checkpoint.load(f / name) for f in (folder, other))
    pairs = list(zip(tensors(ours["learner"]), tensors(theirs["learner"]), strict=True))
    assert len(pairs) > 100
    for one, two in pairs:
        assert torch.equal(one, two)
    assert without_times(rows(folder)) == without_times(rows(other))
    assert scalars(folder) == scalars(other)
    tables = [table(path) for path in (folder, other)]
    assert tables[0] == tables[1]
    assert [line["epoch"] for line in tables[0]] == [str(n + 1) for n in range(epochs)]
    layers = [read(path) for path in (folder, other)]
    assert layers[0].steps.tolist() == layers[1].steps.tolist() != []
    assert np.array_equal(layers[0].values, layers[1].values, equal_nan=True)
