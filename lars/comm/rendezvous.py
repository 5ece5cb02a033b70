"""How the ranks of torch.distributed find each other: their numbers, and the address of rank 0's store.

torchrun states all of it. Other launchers state the numbers. The address is then ``MASTER_ADDR`` if the user has set
it, this host if all ranks run on it, the first host of the Slurm step, or what mpi4py broadcasts.

A store holds the addresses of the ranks. torchrun's store outlives the ranks when it restarts them, so each start of
the ranks has its own prefix in it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import socket
import time
import zlib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lars.errors import UsageError
from lars.launcher import Place

# How long the first rank waits for the last one to start.
_JOIN_SECONDS = 300.0

# How often rank 0 looks for tokens of other ranks.
_POLL_SECONDS = 0.02

# Variables that identify the job, in the order in which they are looked up. All its tasks have the same value, and no
# other job on these hosts has it: Open MPI 5, Open MPI 4, Slurm.
_JOB = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID")

# MPICH's mpiexec sets no such variable. It starts this program on each host, whose option names the job.
_HYDRA, _HYDRA_JOB = "hydra_pmi_proxy", "--control-port"

# Ports below those that the system hands out by itself.
_PORTS = range(20000, 30000)


def store(place: Place, environment: Mapping[str, str] = os.environ) -> Any:
    """Connect to the store of a job, which runs in the process of rank 0 or in that of torchrun.

    Raises:
        UsageError: The address is unknown, or the store cannot be reached. The message names what to set.
        dist.DistError: Another rank has not arrived in time.
    """
    by_torchrun = place.launcher == "torchrun"
    job = "" if by_torchrun else job_name(environment)
    host, port = address(place, job, environment)
    serves = place.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        server = dist.TCPStore(
            host, port, place.size, serves, timedelta(seconds=_JOIN_SECONDS), wait_for_workers=False
        )
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        problem = "cannot listen on" if serves else "cannot reach"
        fix = (
            "give torchrun on that host --local-addr with an address that the other hosts can reach"
            if by_torchrun
            else "set MASTER_ADDR and MASTER_PORT to an address of rank 0's host that the other hosts can reach and "
            "to a free port"
        )
        raise UsageError(f"rank {place.rank} {problem} {host}:{port} ({reason}); {fix}") from error
    # Another job whose ranks connect here by mistake does not see this job's keys.
    return dist.PrefixStore(start_name(place, server) if by_torchrun else job, server)


def start_name(place: Place, store: Any) -> str:
    """Agree with the other ranks on a name that no earlier start of the ranks has used.

    The variables of torchrun cannot distinguish the starts, because each host counts its own restarts. So every other
    rank sends a random token, and rank 0 answers each token with the name. Tokens of ranks that have ended get answers
    that nobody reads. Rank 0 returns when every rank has confirmed the answer.

    Raises:
        dist.DistError: Another rank has not arrived in time.
    """
    own = secrets.token_hex(8)
    if place.rank:
        store.set(f"token of rank {place.rank}", own)
        name = store.get(f"answer to {own}").decode()
        store.set(f"{name} has reached rank {place.rank}", "")
        return str(name)
    missing, answered = set(range(1, place.size)), dict[int, bytes]()
    until = time.monotonic() + _JOIN_SECONDS
    while missing:
        for rank in sorted(missing):
            key = f"token of rank {rank}"
            if store.check([key]) and (token := store.get(key)) != answered.get(rank):
                store.set(f"answer to {token.decode()}", own)
                answered[rank] = token
            if store.check([f"{own} has reached rank {rank}"]):
                missing.remove(rank)
        if missing and time.monotonic() > until:
            absent = ", ".join(map(str, sorted(missing)[:8]))
            raise dist.DistError(f"timed out: {len(missing)} ranks have not arrived: {absent}")
        time.sleep(_POLL_SECONDS)
    return own


def address(place: Place, job: str, environment: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of the store.

    Raises:
        UsageError: The ranks run on several hosts, and the host of rank 0 is unknown.
    """
    port = environment.get("MASTER_PORT", "")
    if port and not (port.isdigit() and 0 < int(port) < 2**16):
        raise UsageError(f"MASTER_PORT={port} is not a port; use a number from 1 to 65535")
    chosen = int(port) if port else _PORTS[zlib.crc32(job.encode()) % len(_PORTS)]
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"], chosen
    if place.local_size == place.size:
        return "127.0.0.1", chosen
    if place.launcher == "srun":
        hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        if hosts:
            return first_host(hosts), chosen
    if importlib.util.find_spec("mpi4py"):
        return _host_by_mpi(place), chosen
    raise UsageError(
        f"the {place.size} ranks run on several hosts, and the address of rank 0 is unknown; set MASTER_ADDR to the "
        f"first host's name on all of them (Open MPI: {place.launcher} -x MASTER_ADDR=HOST), or install mpi4py"
    )


def job_name(environment: Mapping[str, str]) -> str:
    """A word that is equal in all tasks of a job and different in other jobs."""
    found = next((name for name in _JOB if name in environment), None)
    if found is None:
        return hydra_job(os.getpid()) or "job"
    if found != "SLURM_JOB_ID":
        # Under Slurm, mpirun starts its tasks on other hosts by srun, so only those tasks have a Slurm step.
        return environment[found]
    step = environment.get("SLURM_STEP_ID") or environment.get("SLURM_STEPID", "")
    return f"{environment[found]}.{step}"


def hydra_job(pid: int) -> str:
    """Host and port of the mpiexec of MPICH that started a process, or "" if none did.

    Its proxy is an ancestor of the process. Shells may be between them.
    """
    while pid > 1:
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        except OSError:  # another user's process, or a system without /proc
            return ""
        if os.path.basename(words[0]) == _HYDRA and _HYDRA_JOB in words[:-1]:
            return words[words.index(_HYDRA_JOB) + 1]
        pid = int(status.rpartition(")")[2].split()[1])
    return ""


def first_host(hosts: str) -> str:
    """The first host in Slurm's notation: ``gpu[03-05,7],login1`` -> ``gpu03``."""
    without_ranges = re.sub(r"\[(\w+)[^\]]*\]", r"\1", hosts)
    return without_ranges.split(",")[0]


def _host_by_mpi(place: Place) -> str:
    """Rank 0's host name, broadcast by the MPI that started the job.

    Raises:
        UsageError: mpi4py belongs to another MPI than the launcher.
    """
    from mpi4py import MPI

    if MPI.COMM_WORLD.Get_size() != place.size:
        raise UsageError(
            f"mpi4py sees {MPI.COMM_WORLD.Get_size()} of the {place.size} tasks that {place.launcher} started, because "
            "it was built for another MPI; set MASTER_ADDR to the first host's name on all hosts"
        )
    return str(MPI.COMM_WORLD.bcast(socket.gethostname(), root=0))
