"""Images/s of training on images that the loader decodes, compared with images that are on the device already."""

from __future__ import annotations

import time
from collections.abc import Iterator

from lars.comm.world import World
from launch.acceptance import loading, training
from launch.acceptance.budget import Budget
from launch.acceptance.rows import Row, measured, not_tested

# On a GPU, training on loaded images should have this share of the speed on resident ones.
_LEAST_SHARE = 0.9
_SECONDS = 10.0
_FIX = "the loader is too slow: DALI, --workers, or records of smaller images (docs/data.md)"


def run(budget: Budget) -> Iterator[Row]:
    """Train on resident images, then with each loader."""
    world, setting = World(), training.usual_setting()
    device = training.device_of(world)
    on_gpu = device.type == "cuda"
    learner = training.make(setting, world, device)
    seconds = min(_SECONDS, budget.left() / 4)

    def rate(batches: Iterator[object]) -> float:
        deadline = time.monotonic() + seconds
        per_step = training.step_seconds(
            learner,
            batches,
            setting.batch_size,
            steps=200 if on_gpu else 4,
            enough=lambda: time.monotonic() > deadline,
            warm_up=5 if on_gpu else 1,
        )
        return setting.batch_size / per_step

    resident = rate(training.resident(learner, setting))
    count = 32 * setting.batch_size if on_gpu else 8 * setting.batch_size
    for dali in (False, True):
        what = f"training with {'DALI' if dali else 'the built-in loader'}"
        if dali and not loading.has_dali():
            yield not_tested(what, "DALI is not installed; ./launch/setup.sh --dali")
            continue
        source = loading.source_of(
            budget.folder / what, dali=dali, count=count, image_size=setting.image_size
        )
        with loading.batches_of(source, setting.batch_size) as batches:
            loaded = rate(learner.prepared(batches))
        low = _LEAST_SHARE * resident if on_gpu else None
        note = f"{loaded / resident:.0%} of the speed on images that are in memory ({resident:.1f})"
        if low is not None and loaded < low:
            note = f"{note}; {_FIX}"
        yield measured(what, loaded, "images/s", low=low, note=note)
