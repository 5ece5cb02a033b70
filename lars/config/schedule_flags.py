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
        "learning rate before scaling; the peak that warm-up reaches, unless --warmup-multiplier is given",
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
        "epochs of linear warm-up; may be fractional (default: 5; 0 for tvlars and for the schedules none and ramp; 20 "
        "for lars-warm)",
        group="schedule",
        at_least=0,
    )
    warmup_multiplier: float | None = flag(
        None,
        "start the warm-up at the base rate and end it at this many times the base rate, which is --base-lr after "
        "--lr-scaling (default: start at 0 and end at the base rate). For the gradual warm-up of Goyal et al., use "
        "--lr-scaling keep with the number of ranks x accumulation",
        group="schedule",
        at_least=1,
    )
    lr_schedule: str = flag(
        "polynomial",
        "schedule after the warm-up: polynomial or cosine decay to --end-lr; step (division by 10 at each epoch of "
        "--lr-decay); constant; none (constant, without a warm-up); lars-warm (peak --base-lr x effective batch size / "
        "256, then a cosine to 0.001 of the peak); epochwise-polynomial (warm-up in one stair per epoch, one epoch at "
        "the peak, polynomial decay); ramp (growth by a constant factor per step from --base-lr to --end-lr, to find "
        "the rate at which training diverges) (default: polynomial; constant for tvlars)",
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
        0.0,
        "learning rate at the end of polynomial or cosine decay, or of ramp",
        group="schedule",
        at_least=0,
    )
    lr_decay: tuple[int, ...] = flag(
        (30, 60, 80), "epochs at which --lr-schedule step divides the rate by 10", group="schedule"
    )
