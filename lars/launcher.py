"""What a launcher leaves in the environment of its tasks: all that a rank knows before it has met the others.

Importing this module costs nothing.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping
from typing import NamedTuple


class Launcher(NamedTuple):
    """A program that starts the tasks of a job, and the variables that it sets for each of them.

    Attributes:
        name: What the user types.
        size: Variable with the number of tasks.
        rank: Variable with the number of this task, from 0.
        local_size: Variable that begins with the number of tasks on this host.
        mark: Variable that only this launcher sets; None: `size` is such a variable.
    """

    name: str
    size: str
    rank: str
    local_size: str
    mark: str | None = None

    def started(self, environment: Mapping[str, str]) -> bool:
        """Whether this launcher started the process with this environment."""
        return (self.mark or self.size) in environment and self.size in environment


LAUNCHERS = (
    Launcher("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    Launcher("mpiexec", "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS"),
    Launcher("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    # SLURM_STEP_TASKS_PER_NODE is such as 2(x3),1: the first number belongs to the first hosts.
    Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE"),
    Launcher("horovodrun", "HOROVOD_SIZE", "HOROVOD_RANK", "HOROVOD_LOCAL_SIZE"),
    Launcher("torchrun", "WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", mark="TORCHELASTIC_RUN_ID"),
)  # fmt: skip

# Any of these shows that a launcher is at work, even one that does not tell the number of tasks.
_PREFIXES = (
    "OMPI_", "PMI_", "PMIX_", "MV2_", "MPI_LOCAL", "SLURM_STEP_", "JSM_", "PALS_", "ALPS_", "HOROVOD_",
    "TORCHELASTIC_",
)  # fmt: skip

# The tasks of one launcher may start this far apart.
_START_SECONDS = 1.0
# The first task to fail has this long to report its error and to end the job.
_TURN_SECONDS = 2.0


def is_task(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process."""
    return any(name.startswith(_PREFIXES) for name in environment)


def tasks(environment: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """The number of tasks, and the launcher's name; (1, "the launcher") if the environment does not say."""
    found = [
        (int(environment[launcher.size]), launcher.name)
        for launcher in LAUNCHERS
        if launcher.started(environment)
    ]
    return max(found, default=(1, "the launcher"))


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """The number of this task, from 0; 0 if the environment does not say."""
    return max(
        int(environment.get(launcher.rank, 0))
        for launcher in LAUNCHERS
        if launcher.mark is None or launcher.mark in environment
    )


def announce(line: str) -> None:
    """Print a line on the first task, before anything that takes long."""
    if rank() == 0:
        print(line, flush=True)


def allotted_cpus(environment: Mapping[str, str] = os.environ) -> int:
    """CPUs that this rank may keep busy, at least 1.

    ``SLURM_CPUS_PER_TASK`` decides if it is set. Otherwise these are the CPUs that the process may run on, which
    follow cpusets and the launcher's binding. If the host has too few CPUs for each rank to own that many, the ranks
    share them equally.
    """
    usable = len(os.sched_getaffinity(0))
    if environment.get("SLURM_CPUS_PER_TASK", "").isdigit():
        return max(1, min(usable, int(environment["SLURM_CPUS_PER_TASK"])))
    found = (environment[each.local_size] for each in LAUNCHERS if each.local_size in environment)
    local_size = int(re.sub(r"\D.*", "", next(found, "1")) or 1)
    bound = usable * local_size <= (os.cpu_count() or 1)
    return usable if bound else max(1, usable // local_size)


def wait_to_report(code: int, *, met: bool, echo: bool = False) -> None:
    """Wait until this task may report its error, so that the job reports its first cause once.

    Most errors occur on all ranks at once, and the failure of one rank causes errors on the others. Rank 0, or the
    rank that failed first, reports and ends the job while the others still wait here.

    Args:
        code: Exit code of this task. A task that the launcher ends with SIGTERM meanwhile exits with the same code:
            srun reports the highest code of all tasks, and death by the signal would make it 143.
        met: Whether the ranks have met. If not, rank 0 waits too, until the others have certainly started.
        echo: Whether this error only reports that another rank has failed.
    """
    if tasks()[0] == 1:
        return
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    time.sleep(_START_SECONDS * (not met) + _TURN_SECONDS * ((rank() > 0) + echo))
