"""Images/s of the loaders on JPEGs of ImageNet's usual size."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from lars.comm.world import World
from launch.acceptance import loading, training
from launch.acceptance.budget import Budget
from launch.acceptance.rows import Row, failed, measured, not_tested

_SECONDS, _SECONDS_ON_CPU = 10.0, 2.0  # of measurement


def run(budget: Budget) -> Iterator[Row]:
    """Measure the built-in loader, then DALI."""
    on_gpu = torch.cuda.is_available()
    batch_size, count = (256, 8192) if on_gpu else (32, 256)
    device = training.device_of(World())
    training.wait(device)  # loaders use the GPU that has been used before
    seconds = min(_SECONDS if on_gpu else _SECONDS_ON_CPU, budget.left() / 4)
    decoder = loading.decoder()
    for dali in (False, True):
        what = "DALI" if dali else f"built-in loader ({decoder})"
        if dali and not loading.has_dali():
            yield not_tested(what, "DALI is not installed; ./launch/setup.sh --dali")
            continue
        try:
            source = loading.source_of(budget.folder / what, dali=dali, count=count)
            with loading.batches_of(source, batch_size) as batches:
                rate = images_per_second(batches, batch_size, seconds)
        except Exception as error:  # DALI raises its own kinds of errors
            yield failed(what, f"{type(error).__name__}: {error}".split("\n")[0])
            continue
        where = "decodes on the GPU" if dali and on_gpu else f"{loading.workers()} workers"
        yield measured(f"{what}, 500x375 JPEGs to 224 px", rate, "images/s", note=where)


def images_per_second(batches: Iterator[object], batch_size: int, seconds: float) -> float:
    """The speed after as many batches as the workers may have ready."""
    deadline = time.perf_counter() + seconds
    for _ in range(2 * loading.workers() + 1):
        next(batches)
        if time.perf_counter() > deadline:
            break
    began, taken = time.perf_counter(), 0
    while taken < 2 or time.perf_counter() - began < seconds:
        next(batches)
        taken += 1
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return taken * batch_size / (time.perf_counter() - began)
