"""Validation: of a network in training, and of the weights in a file (``--evaluate``)."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lars import launcher
from lars.config.config import Config
from lars.config.flags import flag_name
from lars.config.plan import Share
from lars.errors import CheckpointError, UsageError
from lars.job.job import Job
from lars.learner import build
from lars.learner.device import pick_device
from lars.learner.forward import Forward
from lars.learner.metrics import Metrics, count, means
from lars.observe.summary import counted, measured
from lars.run.records import Row, encoded
from lars.run.weights import load_into, read_on_root, refuse_other_classes


def validation_only(config: Config, source: Any) -> Any:
    """Check the flags of ``--evaluate``, and return a source whose training images are not needed.

    Raises:
        UsageError: Another flag contradicts --evaluate.
        CheckpointError: The file does not exist.
    """
    for name, default in (("benchmark", None), ("branch", None), ("resume", "auto")):
        if getattr(config, name) != default:
            raise UsageError(
                f"--evaluate and {flag_name(name)} cannot be used together; leave one of them out"
            )
    path = Path(config.evaluate or "")
    if launcher.rank() == 0 and not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"--evaluate {path} {what}; name a file of weights, such as RUN/best.safetensors"
        )
    return source.for_validation()


def run(config: Config, source: Any, job: Job, workers: int) -> None:
    """Validate the networks in the file ``--evaluate``. Print one line and one JSON row for each; write no file.

    A file holds one network, and its moving average if there is one.

    Raises:
        CheckpointError: The file cannot be read, or it holds no weights.
        UsageError: The weights do not fit the model or the classes of the images.
    """
    job.interrupt.release()  # there is nothing to save, so a signal should end the process at once
    path, world = config.evaluate or "", job.world
    if source.description:
        launcher.announce(source.description)
    weights = read_on_root(Path(path), world)
    refuse_other_classes(path, weights, source.class_names)
    device = pick_device(config.no_cuda, world)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model, task, _ = build.setup(config, source, world)
    model.to(device).to(memory_format=layout)  # type: ignore[call-overload]
    if config.compile:
        model.compile()
    forward = Forward(task, device, config.amp)
    loader = source.val_loader(_share(config, world.rank, world.size), workers)
    for split in weights.networks:
        load_into(model, weights, split, path, config.model)
        totals, seconds = evaluate(forward, model, loader, source.val_size, job)
        if world.is_root:
            _report({"evaluated": path, "split": split}, forward, totals, seconds)
            left_out = source.val_size - count(totals)
            if left_out:
                unreadable = counted(left_out, "image")
                print(
                    f"warning: {unreadable} could not be read and did not count",
                    file=sys.stderr,
                    flush=True,
                )
    loader.close()


def _share(config: Config, rank: int, size: int) -> Share:
    """The part of the validation images that a rank reads."""
    return Share(
        rank=rank,
        size=size,
        batch_size=config.batch_size,
        effective_batch_size=config.batch_size * size,
        val_batch_size=config.val_batch_size,
        drop_last=config.drop_last,
        seed=config.seed,
    )


def _report(row: Row, forward: Forward, totals: Tensor, seconds: float) -> None:
    """Print a result as a line of text and as a line of JSON that begins with the entries of `row`."""
    scales, images = forward.task.scales, count(totals)
    values, speed = means(scales, totals), images / seconds
    print(f"{row['split']} {measured(scales, values)}  {images} images  {speed:.0f} images/s")
    times = {"images_per_second": round(speed, 2), "seconds": round(seconds, 3)}
    print(encoded(row | {"images": images} | values | times).decode(), end="", flush=True)


@torch.no_grad()
def evaluate(
    forward: Forward, model: nn.Module, loader: Any, val_size: int, job: Job
) -> tuple[Tensor, float]:
    """Measure a network on the validation images. Each image counts exactly once over all ranks.

    Returns:
        `Metrics.totals` over all ranks, and the time in seconds.

    Raises:
        RuntimeError: The number of images that were counted is not `val_size`.
    """
    began, was_training = time.perf_counter(), model.training
    model.eval()
    metrics = Metrics(forward.task.scales, forward.device)
    for number, batch in enumerate(forward.prepared(loader), start=1):
        job.heartbeat(f"batch {number} of the validation")
        forward.forward(batch, model, metrics)
    totals = metrics.all_reduce(job.world, "validation metrics")
    unreadable = sum(job.world.all_gather_object(len(loader.bad_images), "unreadable"))
    if not count(totals) <= val_size <= count(totals) + unreadable:
        counted = f"{count(totals)} images, and {unreadable} that cannot be read"
        raise RuntimeError(f"validation counted {counted}, not {val_size}: did the files change?")
    model.train(was_training)
    return totals, time.perf_counter() - began
