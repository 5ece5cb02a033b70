"""A training step never lets the host wait for the GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lars.comm.world import World
from launch.acceptance import training
from launch.acceptance.budget import Budget
from launch.acceptance.rows import OK, Row, failed, not_tested

_STEPS = 5


def run(budget: Budget) -> Iterator[Row]:
    """Take steps while torch raises an error for everything that waits."""
    what = "step without a host wait"
    if not torch.cuda.is_available():
        yield not_tested(what, "there is no GPU; tests/lars/test_ahead.py tests it on a CPU")
        return
    for amp in ("bf16", "fp16"):
        setting = training.Setting(amp=amp, batch_size=64)
        yield tested(f"{what}, {amp}", setting)


def tested(what: str, setting: training.Setting) -> Row:
    """Let torch report the first operation that waits."""
    learner = training.make(setting, World(), training.device_of(World()))
    batches = training.resident(learner, setting)

    def launch(*, settle: bool) -> None:
        learner.launch(batches, 0, count=1, samples=setting.batch_size, settle=settle)

    for _ in range(3):  # the first steps may wait: they create the state of the optimizer
        launch(settle=True)
    # The host waits for the result of the step before. That is an event, which this mode does not count.
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(_STEPS):
            launch(settle=False)
    except RuntimeError as error:
        return failed(what, f"{error}".split("\n")[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    launch(settle=True)
    return Row(what, OK, note=f"{_STEPS} steps under torch.cuda.set_sync_debug_mode('error')")
