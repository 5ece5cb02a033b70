"""Images/s of a training step with torch.compile. The step without it is in the part "step"."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from lars.comm.world import World
from launch.acceptance import training
from launch.acceptance.budget import Budget
from launch.acceptance.parts.step import judged, row_of
from launch.acceptance.rows import Row, not_tested

# What compiling may take on two CPUs. On a GPU it takes about one minute.
_SECONDS_ON_CPU = 150.0


def run(budget: Budget) -> Iterator[Row]:
    """Compile the usual setting, and measure it."""
    device = training.device_of(World())
    setting = training.usual_setting()._replace(compile=True)
    if device.type == "cpu" and budget.left() < _SECONDS_ON_CPU:
        yield not_tested(
            str(setting),
            f"on a CPU it may take {_SECONDS_ON_CPU:.0f} s; --only compile, or more --minutes",
        )
        return
    row = row_of(setting, device, math.inf)
    yield row
    yield from judged([row], torch.cuda.get_device_name(device) if device.type == "cuda" else "")
