"""What a launcher sets in the environment of its tasks. A rank knows nothing else until it joins the others.

The module imports only the standard library, so that ``--help`` and flag errors appear at once.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping
from typing import NamedTuple


class Launcher(NamedTuple):
    """A program that starts the tasks of a job, and the environment variables that it sets in each of them.

    Attributes:
        name: The command that the user types.
        size: Variable with the number of tasks.
        rank: Variable with the number of this task, from 0.
        local_rank: Variable with the number of this task on its host, from 0.
        local_size: Variable whose leading digits are the number of tasks on this host.
        mark: Variable that only this launcher sets. None if `size` is such a variable.
    """

    name: str
    size: str
    rank: str
    local_rank: str
    local_size: str
    mark: str | None = None

    def started(self, environment: Mapping[str, str]) -> bool:
        """Whether this launcher started the process with this environment."""
        return (self.mark or self.size) in environment and self.size in environment

    def knows_local_size(self, environment: Mapping[str, str]) -> bool:
        """Whether this launcher states the number of tasks on this host."""
        return (self.mark or self.local_size) in environment and self.local_size in environment


# The innermost launcher comes first: srun may start torchrun or mpirun, which then start the ranks.
LAUNCHERS = (
    Launcher("torchrun", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", mark="TORCHELASTIC_RUN_ID"),
    Launcher("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK",
             "OMPI_COMM_WORLD_LOCAL_SIZE"),
    Launcher("mpiexec", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK",
             "MV2_COMM_WORLD_LOCAL_SIZE"),
    Launcher("horovodrun", "HOROVOD_SIZE", "HOROVOD_RANK", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    # SLURM_STEP_TASKS_PER_NODE looks like "2(x3),1". Its first number applies to the first hosts.
    Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)  # fmt: skip

# A variable with one of these prefixes shows that a launcher started the process, even if no variable gives the number
# of tasks.
_PREFIXES = (
    "OMPI_", "PMI_", "PMIX_", "MV2_", "MPI_LOCAL", "SLURM_STEP_", "JSM_", "PALS_", "ALPS_", "HOROVOD_",
    "TORCHELASTIC_",
)  # fmt: skip

# Launchers with these variables do not state the number of tasks: jsrun, PALS and ALPS.
_UNCOUNTED = ("JSM_", "PALS_", "ALPS_")

# How far apart in time the tasks of a job may start.
_START_SECONDS = 1.0
# How long the first task that fails has to report its error and end the job.
_TURN_SECONDS = 2.0


def is_task(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process."""
    return any(name.startswith(_PREFIXES) for name in environment)


def without(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what a launcher sets. A process with it is not a task."""
    own = {name for launcher in LAUNCHERS for name in launcher[1:5]} | {
        "MASTER_ADDR",
        "MASTER_PORT",
    }
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(_PREFIXES) and name not in own
    }


def hides_tasks(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process that does not state the number of tasks."""
    return tasks(environment)[0] == 1 and any(name.startswith(_UNCOUNTED) for name in environment)


def tasks(environment: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """The number of tasks and the launcher's name. (1, "the launcher") if they are unknown."""
    found = [
        (int(environment[launcher.size]), launcher.name)
        for launcher in LAUNCHERS
        if launcher.started(environment)
    ]
    return max(found, default=(1, "the launcher"))


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """The number of this task, from 0. 0 if it is unknown.

    If a launcher has started another one, the number is that of the launcher with the most tasks, as in `tasks`. The
    two may number the hosts in different orders.
    """
    started = [launcher for launcher in LAUNCHERS if launcher.started(environment)]
    if started:
        largest = max(started, key=lambda launcher: int(environment[launcher.size]))
        return int(environment.get(largest.rank, 0))
    return max(
        int(environment.get(launcher.rank, 0)) for launcher in LAUNCHERS if launcher.mark is None
    )


class Place(NamedTuple):
    """What the launcher states about a task.

    Attributes:
        launcher: The command that started the task; "" without a launcher.
        size: Number of tasks.
        rank: Number of this task, from 0.
        local_rank: Number of this task on its host, from 0.
        local_size: Number of tasks on this host; 0 if it is unknown.
    """

    launcher: str
    size: int
    rank: int
    local_rank: int
    local_size: int


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place of this task in its job."""
    for each in LAUNCHERS:
        if each.started(environment):
            return Place(
                launcher=each.name,
                size=int(environment[each.size]),
                rank=int(environment.get(each.rank, 0)),
                local_rank=int(environment.get(each.local_rank, 0)),
                local_size=_leading_number(environment.get(each.local_size, "")),
            )
    return Place("", 1, 0, 0, 1)


def _leading_number(text: str) -> int:
    return int(re.sub(r"\D.*", "", text) or 0)


def announce(line: str) -> None:
    """Print a line on the first task, before anything that takes long."""
    if rank() == 0:
        print(line, flush=True)


def allotted_cpus(environment: Mapping[str, str] = os.environ) -> int:
    """The number of CPUs that this rank should use, at least 1.

    ``SLURM_CPUS_PER_TASK`` applies if it is set. Otherwise it is the number of CPUs in the process's affinity mask,
    which respects cpusets and the launcher's binding. If the ranks of this host are not bound to separate CPUs, they
    share them equally.
    """
    usable = len(os.sched_getaffinity(0))
    if environment.get("SLURM_CPUS_PER_TASK", "").isdigit():
        return max(1, min(usable, int(environment["SLURM_CPUS_PER_TASK"])))
    sizes = (
        environment[each.local_size] for each in LAUNCHERS if each.knows_local_size(environment)
    )
    local_size = _leading_number(next(sizes, "")) or 1
    bound = usable * local_size <= (os.cpu_count() or 1)
    return usable if bound else max(1, usable // local_size)


def wait_to_report(code: int, *, met: bool, echo: bool = False) -> None:
    """Wait until this task may report its error, so that the job reports the first cause once.

    Most errors occur on all ranks at once, and the failure of one rank causes errors on the others. Rank 0, or the
    rank that failed first, reports its error and ends the job while the others still wait here.

    Args:
        code: Exit code of this task. It also applies if the launcher ends this task with SIGTERM while it waits. srun
            reports the highest exit code of all tasks, and a task that the signal kills would raise it to 143.
        met: Whether the ranks have joined. If not, rank 0 also waits, until all other tasks have started.
        echo: Whether this error is only a consequence of another rank's failure.
    """
    if tasks()[0] == 1:
        return
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    time.sleep(_START_SECONDS * (not met) + _TURN_SECONDS * ((rank() > 0) + echo))
