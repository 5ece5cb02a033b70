"""The flags that show what a run will do, and how it compares with published runs."""

from __future__ import annotations

from dataclasses import dataclass

from lars.config.flags import flag


@dataclass(frozen=True)
class PlanFlags:
    """The plan before the run, and the expected accuracy during the run."""

    dry_run: bool = flag(
        False,
        "check the flags, the data, the run folder and the disk, print the plan, and exit without training; nothing is "
        "written",
        group="plan",
        same_run=False,
    )
    plan_ranks: int | None = flag(
        None,
        "with --dry-run in one process: print the plan for this number of ranks",
        group="plan",
        at_least=1,
        same_run=False,
    )
    images_per_second: float | None = flag(
        None,
        "speed of training over all ranks, if you know it; the plan then shows how long an epoch and the run take",
        group="plan",
        above=0,
        same_run=False,
    )
    expected_curve: str | None = flag(
        None,
        "published runs with which every validation is compared, such as mlperf-8192; none: no comparison (default: "
        "chosen by the effective batch size for resnet50 with lars on ImageNet)",
        group="plan",
        same_run=False,
    )
