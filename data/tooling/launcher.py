"""Which launcher started this process, from the variables that it sets.

This is a copy of the trainer's table, because `data` does not import `lars`. A test compares the two.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launcher:
    """A launcher and the variables that it sets in each task.

    Attributes:
        name: Its command.
        size: Variable that holds the number of tasks.
        rank: Variable that holds the number of this task, from 0.
        mark: Variable that only this launcher sets, if `size` has a common name.
    """

    name: str
    size: str
    rank: str
    mark: str | None = None

    def started(self, environment: Mapping[str, str]) -> bool:
        """Whether this launcher started a process with this environment."""
        return (self.mark or self.size) in environment and self.size in environment


LAUNCHERS = (
    Launcher("torchrun", "WORLD_SIZE", "RANK", mark="TORCHELASTIC_RUN_ID"),
    Launcher("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),  # Open MPI
    Launcher("mpiexec", "PMI_SIZE", "PMI_RANK"),  # MPICH, Intel MPI
    Launcher("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),  # MVAPICH
    Launcher("horovodrun", "HOROVOD_SIZE", "HOROVOD_RANK"),
    Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def tasks(environment: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """Return the number of tasks and the launcher's name; (1, "") without a launcher."""
    sizes = [
        (int(environment[launcher.size]), launcher.name)
        for launcher in LAUNCHERS
        if launcher.started(environment)
    ]
    return max(sizes, default=(1, ""))


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of this task, from 0; 0 without a launcher.

    If a launcher has started another one, the number is that of the launcher with the most tasks, as in `tasks`.
    """
    started = [launcher for launcher in LAUNCHERS if launcher.started(environment)]
    largest = max(started, key=lambda launcher: int(environment[launcher.size]), default=None)
    return 0 if largest is None else int(environment.get(largest.rank, 0))
