"""Images/s of the trainer's step on noise that is on the device already."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence

import torch

from lars.comm.world import World
from launch.acceptance import training
from launch.acceptance.budget import Budget
from launch.acceptance.expected import expected
from launch.acceptance.rows import OK, Row, measured, not_tested
from launch.acceptance.training import Setting

_BATCH_SIZES = (64, 128, 256, 512)
_STEPS = 30


def settings() -> list[Setting]:
    """What is measured: first the batch sizes, from small to large, then the other choices one by one."""
    usual = training.usual_setting()
    if not torch.cuda.is_available():  # in fp16, CPUs are many times slower
        return [usual, usual._replace(amp="bf16"), usual._replace(channels_last=False)]
    return [
        *(usual._replace(batch_size=size) for size in _BATCH_SIZES),
        usual._replace(amp="off"),
        usual._replace(amp="fp16"),
        usual._replace(channels_last=False),
    ]


def run(budget: Budget) -> Iterator[Row]:
    """Measure each setting until the time is used up or the memory is full."""
    device = training.device_of(World())
    rows: list[Row] = []
    remaining = settings()
    while remaining:
        setting = remaining.pop(0)
        seconds = budget.left() / (len(remaining) + 1)
        if seconds < 1:
            row = not_tested(str(setting), "the time is used up; --minutes")
        else:
            row = row_of(setting, device, seconds / 2)  # the other half is for the warm-up
        rows.append(row)
        yield row
        gc.collect()  # also what the error of a full memory kept
        if device.type == "cuda":
            torch.cuda.empty_cache()
    yield from judged(rows, torch.cuda.get_device_name(device) if device.type == "cuda" else "")


def row_of(setting: Setting, device: torch.device, seconds: float) -> Row:
    """Measure a setting for at most `seconds`."""
    try:
        rate, note = images_per_second(setting, device, seconds)
    except torch.OutOfMemoryError:
        return not_tested(str(setting), "the memory of the GPU is full")
    return measured(str(setting), rate, "images/s", note=note)


def judged(rows: Sequence[Row], gpu: str) -> Iterator[Row]:
    """Compare the fastest row with published speeds, if there are any for this GPU."""
    best = max((row.value for row in rows if row.value and row.verdict == OK), default=None)
    limits = expected(gpu)
    if best is not None and limits is not None:
        note = f"published: PyTorch on an A100 {limits.low:,.0f}, MLPerf {limits.high:,.0f}"
        what = f"the fastest of these, on {gpu}"
        yield measured(what, best, "images/s", low=limits.low, high=limits.high, note=note)


def images_per_second(setting: Setting, device: torch.device, seconds: float) -> tuple[float, str]:
    """The speed of a setting, and the memory that it needs."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    learner = training.make(setting, World(), device)
    deadline = time.monotonic() + seconds
    per_step = training.step_seconds(
        learner,
        training.resident(learner, setting),
        setting.batch_size,
        steps=_STEPS if on_gpu else 3,
        enough=lambda: time.monotonic() > deadline,
        warm_up=3 if on_gpu else 1,
    )
    peak = learner.peak_memory()
    return setting.batch_size / per_step, f"peak {peak / 1e9:.1f} GB" if peak else ""
