"""The flags that show what a run will do, and how it compares with published runs."""

from __future__ import annotations

from dataclasses import dataclass

from lars.config.flags import flag
from lars.errors import UsageError
from lars.expected import curves


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
        "published runs with which to compare every validation, such as mlperf-8192; none: no comparison (default: "
        "chosen by the effective batch size for resnet50 with lars on ImageNet)",
        group="plan",
        same_run=False,
    )

    def check_plan_flags(self) -> None:
        """Check the flags of this class.

        Raises:
            UsageError: A flag is without effect, or its value is unknown.
        """
        for name in ("benchmark", "evaluate"):
            if self.dry_run and getattr(self, name):
                raise UsageError(
                    f"--dry-run and --{name} cannot be used together; use only one of them"
                )
        if self.plan_ranks is not None and not self.dry_run:
            raise UsageError(
                f"--plan-ranks {self.plan_ranks} belongs to --dry-run; add --dry-run, or leave it out"
            )
        curve = self.expected_curve
        if curve not in (None, "none") and curve not in curves():
            raise UsageError(
                f"--expected-curve {curve} is not known; use none or one of {', '.join(curves())}"
            )
