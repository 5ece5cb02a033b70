"""All flags of a training run that do not depend on the source of the images.

The module imports little, so that ``--help`` and flag errors appear at once.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lars.config.flags import check_ranges, flag_name
from lars.config.model_flags import BatchFlags, ModelFlags
from lars.config.optimizer_flags import OptimizerFlags
from lars.config.run_flags import MachineFlags, RunFlags
from lars.config.schedule_flags import ScheduleFlags
from lars.errors import UsageError
from lars.names import OPTIMIZERS


# ``--help`` lists the flags of the last base first.
@dataclass(frozen=True)
class Config(MachineFlags, RunFlags, OptimizerFlags, ScheduleFlags, BatchFlags, ModelFlags):
    """All settings of a training run that do not depend on the source of the images."""

    @classmethod
    def resolved(
        cls, values: dict[str, Any], given: Collection[str], typed: Collection[str]
    ) -> dict[str, Any]:
        """Replace defaults by those of the chosen optimizer.

        Args:
            values: Value of each field.
            given: Fields whose flags were given in a recipe or on the command line.
            typed: Fields whose flags were given on the command line itself. Only these are checked, because a recipe
                may have flags for an optimizer that the command line replaces.

        Raises:
            UsageError: A flag on the command line has no effect with this optimizer.
        """
        name = values["base_op"]
        row = OPTIMIZERS[name]
        owned = {flag for each in OPTIMIZERS.values() for flag in each.flags}
        for unused in sorted(set(typed) & owned - set(row.flags)):
            owners = ", ".join(key for key, each in OPTIMIZERS.items() if unused in each.flags)
            raise UsageError(
                f"{flag_name(unused)} has no effect with --base-op {name}; it belongs to {owners}. Leave it out"
            )
        return values | {key: value for key, value in row.defaults.items() if key not in given}

    def __post_init__(self) -> None:
        """Check the values that do not depend on the number of ranks.

        Raises:
            UsageError: A value is out of range, or two flags contradict each other.
        """
        check_ranges(self)
        if self.nesterov and self.momentum == 0:
            raise UsageError("--nesterov needs a --momentum above 0")
        if self.branch is not None and self.resume != "auto":
            raise UsageError(
                f"--branch and --resume {self.resume} exclude each other; use only one of them"
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
