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
    """

    name: str
    size: str
    rank: str


LAUNCHERS = (
    Launcher("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),  # Open MPI
    Launcher("mpiexec", "PMI_SIZE", "PMI_RANK"),  # MPICH, Intel MPI
    Launcher("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),  # MVAPICH
    Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    Launcher("horovodrun", "HOROVOD_SIZE", "HOROVOD_RANK"),
    Launcher("torchrun", "WORLD_SIZE", "RANK"),
)


def tasks(environment: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """Return the number of tasks and the launcher's name; (1, "") without a launcher."""
    sizes = [
        (int(environment[launcher.size]), launcher.name)
        for launcher in LAUNCHERS
        if environment.get(launcher.size, "").isdigit()
    ]
    return max(sizes, key=lambda size: size[0], default=(1, ""))


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of this task, from 0; 0 without a launcher."""
    ranks = (environment.get(launcher.rank, "") for launcher in LAUNCHERS)
    return max((int(text) for text in ranks if text.isdigit()), default=0)
