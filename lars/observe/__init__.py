"""What a run reports while it trains: console, TensorBoard, metrics.jsonl, values of every layer, custom observers.

`Observer`, `Training` and `StepResult` are public: see docs/observers.md.
"""

from __future__ import annotations

from lars.config.config import Config
from lars.learner.learner import StepResult
from lars.observe.board import Board
from lars.observe.closing import Closing
from lars.observe.console import Console
from lars.observe.layers import Layers, reads_layers
from lars.observe.log import RunLog
from lars.observe.mllog import MLPerfLog
from lars.observe.observer import Observer, Observers, Training
from lars.observe.on_track import OnTrack
from lars.observe.own import Kind, observers_at
from lars.observe.profile import Profile, borders_profile

__all__ = [
    "Board",
    "Console",
    "Layers",
    "MLPerfLog",
    "Observer",
    "Observers",
    "OnTrack",
    "Profile",
    "RunLog",
    "StepResult",
    "Training",
    "observers_of",
    "sees_step",
]

# To add an observer, write its class in a file of its own and add it here.
OBSERVERS: tuple[type[Observer], ...] = (
    *(RunLog, Board, Console, OnTrack, Layers),
    *(Profile, MLPerfLog, Closing),
)


def observers_of(training: Training) -> Observers:
    """Create the observers of this rank: ours and those of --observer on the root, none on other ranks."""
    if not training.run.world.is_root:
        return Observers([])
    kinds: tuple[Kind, ...] = (*OBSERVERS, *observers_at(training.config.observer))
    return Observers([kind(training) for kind in kinds])


def sees_step(config: Config, step: int) -> bool:
    """Whether an observer needs the state after a step, counted from 1, so that the host must wait for it.

    Custom observers may read everything after every step. The answer is the same on all ranks.
    """
    return (
        bool(config.observer)
        or reads_layers(config.layers_every, step)
        or borders_profile(config.profile, step)
    )
