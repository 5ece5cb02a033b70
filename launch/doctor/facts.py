"""What one rank knows about its host, its software and the resources that it may use."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import ipaddress
import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.install.check_allreduce import loaded_mpis

# What each launcher sets in the environment of its tasks, as far as it determines the backend.
LAUNCHED = {
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "2"},
    "srun --mpi=pmix": {"SLURM_STEP_NUM_TASKS": "2", "PMIX_RANK": "0"},
    "srun": {"SLURM_STEP_NUM_TASKS": "2"},
    "torchrun": {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "1"},
}
NOT_INSTALLED = "not installed"
GLOO_SECONDS = 20


@dataclass
class Facts:
    """What one rank knows about itself.

    Attributes:
        versions: Versions of Python, torch, Horovod and MPI; "" for a package that cannot be imported.
        backend: Communication backend of this job; "none" for a single process.
        backends: Launcher -> the backend of a job that it starts here.
        horovod_error: Why Horovod cannot be imported; "" if it can.
        gloo_error: Why torch.distributed cannot connect two ranks on this host; "" if it can.
        kernels_error: Why the optimizers' CPU kernels cannot be compiled; "" if they can.
        world_error: Why the ranks cannot communicate with each other; "" if they can.
        built: The features that Horovod was built with: MPI, Gloo, NCCL.
        cuda_build: Whether torch was built for GPUs.
        gpus: Number of GPUs that this rank sees.
        gpu: Name of the GPU that this rank uses; "" if it uses none.
        cpus: CPUs that this rank may run on.
        cpus_per_task: CPUs that Slurm promised to each task; None if it did not say.
        threads: Number of threads that this rank computes with.
        workers: Default number of decoding processes of this rank.
        shm_free: Free bytes in /dev/shm.
        open_files: How many files this rank may have open; negative if there is no limit.
        disk_free: Free bytes on the disk of the run folder.
        folder_error: Why the run folder cannot be used; "" if it can.
        data_entries: Number of entries in the data folder; None if the user did not name a folder.
        data_error: Why the data folder cannot be read; "" if it can, or if the user did not name one.
        clock: Seconds since 1970, read right after all ranks had passed a barrier.
        networks: Interface -> its IPv4 address with the network's prefix.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    host: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    backend: str = "none"
    backends: dict[str, str] = field(default_factory=dict)
    horovod_error: str = ""
    gloo_error: str = ""
    kernels_error: str = ""
    world_error: str = ""
    built: dict[str, bool] = field(default_factory=dict)
    loaded_mpis: list[str] = field(default_factory=list)
    cuda_build: bool = False
    gpus: int = 0
    gpu: str = ""
    cpus: list[int] = field(default_factory=list)
    cpus_per_task: int | None = None
    threads: int = 1
    workers: int = 0
    shm_free: int = 0
    open_files: int = 0
    disk_free: int = 0
    folder_error: str = ""
    data_entries: int | None = None
    data_error: str = ""
    clock: float = 0.0
    networks: dict[str, str] = field(default_factory=dict)


def hosts_of(ranks: Sequence[Facts]) -> dict[str, list[Facts]]:
    """Host -> facts of its ranks."""
    hosts: dict[str, list[Facts]] = {}
    for facts in ranks:
        hosts.setdefault(facts.host, []).append(facts)
    return hosts


def collect(world: Any, log_dir: Path, data_dir: Path | None) -> Facts:
    """Collect this rank's facts; `world` is the one that lars.comm.start returned."""
    import torch

    from lars.optim.cpu import kernels

    facts = Facts(
        rank=world.rank,
        size=world.size,
        local_rank=world.local_rank,
        host=socket.gethostname(),
        backend=world.backend,
        backends=backends(),
        horovod_error=horovod_error(),
        gloo_error=gloo_error(),
        kernels_error=kernels.compile_error(),
        cuda_build=torch.version.cuda is not None,
        gpus=torch.cuda.device_count(),
        networks=networks(),
    )
    if facts.local_rank < facts.gpus:
        facts.gpu = torch.cuda.get_device_name(facts.local_rank)
    add_versions(facts)
    facts.loaded_mpis = sorted(loaded_mpis())  # by now Horovod and mpi4py are imported
    add_limits(facts)
    add_folders(facts, log_dir, data_dir)
    world.barrier("doctor.clock")
    facts.clock = time.time()
    return facts


def add_versions(facts: Facts) -> None:
    """Add the versions of the software, and what Horovod was built with."""
    import torch

    facts.versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "Horovod": "",
        "MPI": mpi_version(),
    }
    if facts.horovod_error:
        return
    import horovod
    import horovod.torch as hvd

    facts.versions["Horovod"] = horovod.__version__
    facts.built = {
        "MPI": bool(hvd.mpi_built()),
        "Gloo": bool(hvd.gloo_built()),
        "NCCL": bool(hvd.nccl_built()),
    }


def add_limits(facts: Facts) -> None:
    """Add the CPUs, the shared memory and the files that this rank may use."""
    from lars import launcher

    allotted = launcher.allotted_cpus()
    facts.cpus = sorted(os.sched_getaffinity(0))
    facts.threads = int(os.environ.get("OMP_NUM_THREADS") or allotted)
    facts.workers = allotted - 1
    if os.environ.get("SLURM_CPUS_PER_TASK", "").isdigit():
        facts.cpus_per_task = int(os.environ["SLURM_CPUS_PER_TASK"])
    if os.path.isdir("/dev/shm"):
        facts.shm_free = shutil.disk_usage("/dev/shm").free
    facts.open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def add_folders(facts: Facts, log_dir: Path, data_dir: Path | None) -> None:
    """Add the state of the run folder and of the data folder."""
    facts.disk_free = shutil.disk_usage(nearest_existing(log_dir)).free
    facts.folder_error = folder_problem(log_dir)
    if data_dir is not None:
        try:
            facts.data_entries = len(os.listdir(data_dir))
        except OSError as error:
            facts.data_error = f"{data_dir}: {error.strerror}"


def backends() -> dict[str, str]:
    """Launcher -> the backend that a job uses if this launcher starts it here."""
    from lars.comm import start
    from lars.names import BACKENDS

    chosen = {name: start.choose_backend("auto", task)[0] for name, task in LAUNCHED.items()}
    return {
        name: importlib.import_module(BACKENDS[backend]).NAME for name, backend in chosen.items()
    }


def gloo_error() -> str:
    """Why two ranks of torch.distributed cannot sum a tensor over Gloo; "" if they can.

    The two ranks are threads of this process.
    """
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_gloo_available()):
        return "this torch was built without Gloo"
    store = dist.HashStore()

    def total(rank: int) -> float:
        group = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=GLOO_SECONDS))
        values = torch.full((1,), rank + 1.0)
        group.allreduce([values]).wait()
        return values.item()

    try:
        with ThreadPoolExecutor(2) as pool:
            totals = list(pool.map(total, range(2)))
    except RuntimeError as error:
        return f"{error}".strip().split("\n")[0]
    return "" if totals == [3.0, 3.0] else f"the sum of 1 and 2 is {totals}"


def horovod_error() -> str:
    """Why horovod.torch cannot be imported; "" if it can.

    Horovod reports "has not been built" whatever the cause is. Loading its library directly gives the real reason.
    """
    try:
        import horovod.torch  # noqa: F401
    except Exception as error:
        message = f"{error}".strip().split("\n")[0]
    else:
        return ""
    package = importlib.util.find_spec("horovod")
    if package is None:
        return NOT_INSTALLED
    if package.origin is None:
        return message
    library = next(Path(package.origin).parent.glob("torch/mpi_lib*.so"), None)
    if library is None:
        return f"{message} (it was built without PyTorch)"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return message


def mpi_version() -> str:
    """Name and version of the MPI that mpi4py uses; "" if it cannot be loaded."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return ""
    return " ".join(MPI.Get_library_version().strip("\0").split("\n")[0].split(",")[0].split())


def networks() -> dict[str, str]:
    """Interface -> IPv4 address/prefix, for interfaces that are up, without loopback. Empty without psutil."""
    if not importlib.util.find_spec("psutil"):
        return {}
    import psutil

    up = psutil.net_if_stats()
    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if (
                one.family == socket.AF_INET
                and up[name].isup
                and not one.address.startswith("127.")
            ):
                found[name] = str(ipaddress.ip_interface(f"{one.address}/{one.netmask}"))
    return found


def folder_problem(folder: Path) -> str:
    """Why a folder cannot be written; "" if it can. The folder need not exist yet."""
    existing = nearest_existing(folder)
    if not existing.is_dir():
        return f"{existing} is not a folder"
    try:  # os.access is no use for root, which may not write to /proc or a read-only file system either
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        return f"{existing} cannot be written: {error.strerror}"
    return ""


def nearest_existing(folder: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if os.path.exists(path))
