"""The flags that describe the learning rate over a run."""

from __future__ import annotations

from dataclasses import dataclass

from lars.config.flags import flag
from lars.names import SCHEDULES


@dataclass(frozen=True)
class ScheduleFlags:
    """The length of a run, and its learning rate."""

    epochs: int = flag(90, "passes over the training set", group="schedule", at_least=1)
    base_lr: float = flag(
        0.0125,
        "learning rate before scaling; the peak that warm-up reaches",
        group="schedule",
        at_least=0,
        aliases=("--lr",),
    )
    lr_scaling: str = flag(
        "keep",
        "how --base-lr is scaled to the peak rate, with k = ranks x accumulation: keep (unchanged), linear (x k) or "
        "sqrt (x sqrt k)",
        group="schedule",
        choices=("keep", "linear", "sqrt"),
    )
    warmup_epochs: float = flag(
        5.0,
        "epochs of linear warm-up from 0; may be fractional (default: 5; 0 for tvlars)",
        group="schedule",
        at_least=0,
    )
    lr_schedule: str = flag(
        "polynomial",
        "schedule after the warm-up: polynomial or cosine decay to --end-lr, step (division by 10 at each epoch of "
        "--lr-decay), or constant (default: polynomial; constant for tvlars)",
        group="schedule",
        choices=SCHEDULES,
    )
    lr_power: float | None = flag(
        None,
        "power of the polynomial decay (default: 2 for lars, 1 otherwise)",
        group="schedule",
        at_least=0,
    )
    end_lr: float = flag(
        0.0, "learning rate at the end of polynomial or cosine decay", group="schedule", at_least=0
    )
    lr_decay: tuple[int, ...] = flag(
        (30, 60, 80), "epochs at which --lr-schedule step divides the rate by 10", group="schedule"
    )
