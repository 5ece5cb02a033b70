"""What a launcher leaves in the environment of its tasks: all that a rank knows before it has met the others.

Importing this module costs nothing.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping

# How far apart the tasks of one launcher may begin, and how long the first to fail is left to speak and end the job.
_START_SECONDS, _TURN_SECONDS = 1.0, 2.0

_PREFIXES = (
    "OMPI_",
    "PMI_",
    "PMIX_",
    "MV2_",
    "MPI_LOCAL",
    "SLURM_STEP_",
    "JSM_",
    "PALS_",
    "ALPS_",
    "HOROVOD_",
)
_SIZE_VARIABLES = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
    "HOROVOD_SIZE": "horovodrun",
}
_LOCAL_SIZE_VARIABLES = (
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "HOROVOD_LOCAL_SIZE",
    "SLURM_STEP_TASKS_PER_NODE",  # such as 2(x3): the first number is of the first hosts
)
_RANK_VARIABLES = (
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "MV2_COMM_WORLD_RANK",
    "SLURM_PROCID",
    "HOROVOD_RANK",
)


def is_task(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process."""
    return any(name.startswith(_PREFIXES) for name in environment)


def tasks(environment: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """How many tasks the launcher started, and its name; (1, "the launcher") where it does not say."""
    said = [
        (int(environment[name]), who)
        for name, who in _SIZE_VARIABLES.items()
        if name in environment
    ]
    return max(said, default=(1, "the launcher"))


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """This task's number, from 0; 0 where the launcher does not say."""
    return max(int(environment.get(name, 0)) for name in _RANK_VARIABLES)


def allotted_cpus(environment: Mapping[str, str] = os.environ) -> int:
    """CPUs that this rank may keep busy, at least 1.

    ``SLURM_CPUS_PER_TASK`` counts if it is set. Else the CPUs this process may run on, which follow cpusets and a
    launcher's binding, divided by the ranks of this host where these cannot all have CPUs of their own.
    """
    mine = len(os.sched_getaffinity(0))
    if environment.get("SLURM_CPUS_PER_TASK", "").isdigit():
        return max(1, min(mine, int(environment["SLURM_CPUS_PER_TASK"])))
    said = next((environment[name] for name in _LOCAL_SIZE_VARIABLES if name in environment), "1")
    local_size = int(re.sub(r"\D.*", "", said) or 1)
    bound = mine * local_size <= (os.cpu_count() or 1)
    return mine if bound else max(1, mine // local_size)


def take_turn(code: int, *, met: bool, echo: bool = False) -> None:
    """Wait until this task may tell its error, so that the job's first cause is told once.

    Most errors happen everywhere at once, and one rank's failure is an echo on the others. Rank 0, or the rank that
    failed first, speaks and ends the job before the others have waited; they leave without a word.

    Args:
        code: Exit code of this task. A launcher that ends it with SIGTERM meanwhile gets the same: srun reports the
            highest of all tasks, and one killed by the signal would make it 143.
        met: Whether the ranks have met. If not, rank 0 waits too, until the others have surely begun.
        echo: Whether this error only says that another rank has failed.
    """
    if tasks()[0] == 1:
        return
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    time.sleep(_START_SECONDS * (not met) + _TURN_SECONDS * ((rank() > 0) + echo))
