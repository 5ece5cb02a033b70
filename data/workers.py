"""Loader worker processes: how they are started beside MPI, and how many this rank can afford.

Standard library only, so that a script can call `start_forkserver` before it imports anything that
touches MPI.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver

# What a worker needs and nothing else: torch, numpy and the decoder, but neither Horovod nor MPI
# nor torchvision.
_PRELOAD = ["data.loading"]


def start_forkserver() -> None:
    """Start the process that loader workers are forked from, before MPI is initialised.

    Forking a process that has initialised MPI or CUDA corrupts it; the fork server has done
    neither, and since it has imported torch already, each worker starts in milliseconds and shares
    those pages. A second call does nothing. Workers import the main module anew, so a script keeps
    its work under ``if __name__ == "__main__"`` and its heavy imports inside.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    forkserver.ensure_running()


def allotted_cpus(local_size: int = 1) -> int:
    """Return how many CPUs this rank may keep busy, at least 1.

    Args:
        local_size: Ranks on this machine.

    ``SLURM_CPUS_PER_TASK`` counts if it is set. Else it is this process's CPU affinity (which
    follows cpusets and a launcher's binding), shared by the machine's ranks where their masks
    cannot all be disjoint.
    """
    mask = len(os.sched_getaffinity(0))
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdigit():
        return max(1, min(int(slurm), mask))
    bound = mask * local_size <= (os.cpu_count() or 1)
    return mask if bound else max(1, mask // local_size)
