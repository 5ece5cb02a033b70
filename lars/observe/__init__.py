"""What a run reports while it trains: console, TensorBoard, metrics.jsonl, values of every layer."""

from __future__ import annotations

from lars.observe.closing import Closing
from lars.observe.console import Console
from lars.observe.layers import Layers
from lars.observe.log import RunLog
from lars.observe.observer import Observer, Observers, Training
from lars.observe.on_track import OnTrack

__all__ = [
    "Console",
    "Layers",
    "Observer",
    "Observers",
    "OnTrack",
    "RunLog",
    "Training",
    "observers_of",
]

# To add an observer, write its class in a file of its own and add it here.
OBSERVERS: tuple[type[Observer], ...] = (RunLog, Console, OnTrack, Layers, Closing)


def observers_of(training: Training) -> Observers:
    """Create the observers of this rank: all of them on the root, none on other ranks."""
    kinds = OBSERVERS if training.run.world.is_root else ()
    return Observers([kind(training) for kind in kinds])
