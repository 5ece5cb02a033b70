"""All flags of a training run that do not depend on the source of the images.

The module imports little, so that ``--help`` and flag errors appear at once.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from lars.config.flags import check_ranges, flag_name
from lars.config.loss_flags import LossFlags, refuse_single_images, refuse_without_bce
from lars.config.model_flags import BatchFlags, ModelFlags
from lars.config.observe_flags import ObserveFlags
from lars.config.optimizer_flags import OptimizerFlags, literal_options, optimizer_row
from lars.config.plan_flags import PlanFlags
from lars.config.run_flags import MachineFlags, RunFlags
from lars.config.schedule_flags import ScheduleFlags
from lars.errors import UsageError
from lars.names import IMPORTED, OPTIMIZERS, SCHEDULES


# ``--help`` lists the flags of the last base first.
@dataclass(frozen=True)
class Config(
    MachineFlags,
    ObserveFlags,
    PlanFlags,
    RunFlags,
    OptimizerFlags,
    LossFlags,
    ScheduleFlags,
    BatchFlags,
    ModelFlags,
):
    """All settings of a training run that do not depend on the source of the images.

    A task with flags of its own derives from this class, and names its function in `task`.

    Attributes:
        task: Place of the function that chooses the network and the task: ``module:function``. See
            `lars.learner.task.Setup` for its arguments and its result.
    """

    task: ClassVar[str] = "lars.learner.classification:setup"

    @classmethod
    def resolved(
        cls, values: dict[str, Any], given: Collection[str], typed: Collection[str]
    ) -> dict[str, Any]:
        """Replace defaults by those of the chosen optimizer and of the chosen schedule.

        Args:
            values: Value of each field.
            given: Fields whose flags were given in a recipe or on the command line.
            typed: Fields whose flags were given on the command line itself. Only these are checked, because a recipe
                may have flags for an optimizer that the command line replaces.

        Raises:
            UsageError: A flag on the command line has no effect with this optimizer or this loss.
        """
        name = values["base_op"]
        row = optimizer_row(name)
        rows = OPTIMIZERS | {"package.module:Class": IMPORTED}
        owned = {flag for each in rows.values() for flag in each.flags}
        for unused in sorted(set(typed) & owned - set(row.flags)):
            owners = ", ".join(key for key, each in rows.items() if unused in each.flags)
            raise UsageError(
                f"{flag_name(unused)} has no effect with --base-op {name}; it belongs to {owners}. Leave it out"
            )
        refuse_without_bce(values, typed)
        values = values | {key: value for key, value in row.defaults.items() if key not in given}
        own = SCHEDULES[values["lr_schedule"]].defaults
        return values | {key: value for key, value in own.items() if key not in given}

    def __post_init__(self) -> None:
        """Check the values that do not depend on the number of ranks.

        Raises:
            UsageError: A value is out of range, or two flags contradict each other.
        """
        check_ranges(self)
        optimizer_row(self.base_op)
        literal_options(self.optimizer_options)
        self.check_plan_flags()
        self.check_loss_flags()
        refuse_single_images(self, self.batch_size)
        if self.nesterov and self.momentum == 0:
            raise UsageError("--nesterov needs a --momentum above 0")
        if self.fp16_allreduce and self.bf16_allreduce:
            raise UsageError(
                "--fp16-allreduce and --bf16-allreduce cannot be used together; use only one of them"
            )
        self._check_schedule()
        if self.branch is not None and self.resume != "auto":
            raise UsageError(
                f"--branch and --resume {self.resume} cannot be used together; use only one of them"
            )
        for name, usual in (
            ("resume", ("auto", "never")),
            ("branch", (None,)),
            ("evaluate", (None,)),
        ):
            if self.init is not None and getattr(self, name) not in usual:
                raise UsageError(
                    f"--init and {flag_name(name)} cannot be used together, because both choose the weights; use only "
                    "one of them"
                )
        if self.freeze_backbone and self.sync_bn:
            raise UsageError(
                "--sync-bn has no effect with --freeze-backbone, whose BatchNorm keeps its statistics; leave it out"
            )
        for name in self.stop_signals:
            if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
                raise UsageError(
                    f"--stop-signals: {name} is not a signal that can be caught; use, for example, SIGTERM or SIGUSR1"
                )
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must be between 0 and 2^63 - 1, not {self.seed}")
        name = self.checkpoint_format
        if name.count("{epoch}") != 1 or "/" in name or name.startswith("."):
            raise UsageError(
                f"--checkpoint-format must be a file name that contains {{epoch}} once and does not begin with a dot, "
                f"not {name!r}"
            )
        if self.run_name is not None and not re.fullmatch(r"\w[\w.+=,@%-]*", self.run_name):
            raise UsageError(f"--run-name must be a plain folder name, not {self.run_name!r}")

    def ignored_by_the_schedule(self) -> list[str]:
        """Fields with another value than the default that have no effect with this learning-rate schedule."""
        row, optimizer = SCHEDULES[self.lr_schedule], optimizer_row(self.base_op)
        owned = dict.fromkeys(name for each in SCHEDULES.values() for name in each.flags)
        usual = {f.name: f.default for f in fields(self)} | optimizer.defaults | row.defaults
        return [
            name for name in owned if name not in row.flags and getattr(self, name) != usual[name]
        ]

    def _check_schedule(self) -> None:
        """Raise UsageError if the learning rate does not follow from the flags."""
        name = self.lr_schedule
        if self.warmup_multiplier is not None:
            if "warmup_multiplier" not in SCHEDULES[name].flags:
                raise UsageError(
                    f"--warmup-multiplier has no effect with --lr-schedule {name}; leave it out"
                )
            if self.warmup_epochs == 0:
                raise UsageError(
                    "--warmup-multiplier needs a warm-up; add --warmup-epochs, or leave it out"
                )
        if name == "ramp" and not 0 < self.base_lr < self.end_lr:
            raise UsageError(
                f"--lr-schedule ramp needs a --base-lr above 0 and a larger --end-lr, not {self.base_lr:g} and "
                f"{self.end_lr:g}"
            )
        if name == "epochwise-polynomial" and self.warmup_epochs % 1:
            raise UsageError(
                f"--warmup-epochs {self.warmup_epochs:g}: --lr-schedule {name} needs a whole number"
            )
