"""Say what is wrong with this machine, or with all the ranks that a launcher started, and how to mend it.

``python -m launch.doctor`` looks at this machine; under ``launch/mpirun.sh -np 8 -m launch.doctor`` or srun at every
rank, and at the network between them. Every rank tells its `Facts`; the checks are functions of all ranks' facts.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import ipaddress
import os
import platform
import resource
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from launch.check_allreduce import loaded_mpis

OK, WARNING, WRONG = "OK", "warning", "wrong"
MEBI = 1 << 20
# A decoding process keeps about two batches of 128 images of 224 px in shared memory.
SHARED_PER_WORKER = 2 * 128 * 3 * 224 * 224
# ResNet-50's weights, momentum and statistics: one checkpoint of it.
CHECKPOINT_BYTES = 205 * 10**6
ALLREDUCE_BYTES = 100 * MEBI
SLOW_BYTES_PER_SECOND = 10**9 // 8  # of Ethernet with 1 Gbit/s
PATIENCE = 120  # seconds for the ranks to meet


class Row(NamedTuple):
    """What was looked at, how it is (OK, warning or wrong), what was found, and what mends it."""

    what: str
    state: str
    found: str
    fix: str = ""


@dataclass
class Facts:
    """What one rank knows about itself.

    Attributes:
        versions: Of Python, torch, Horovod, MPI; "" for what cannot be imported.
        horovod_error: Why Horovod cannot be imported; "" if it can.
        kernels_error: Why the optimizers' CPU kernels cannot be compiled; "" if they can.
        world_error: Why the ranks do not form one world; "" if they do.
        built: What Horovod was built with: MPI, Gloo, NCCL.
        cuda_build: Whether torch was built for GPUs.
        gpus: GPUs that this rank sees.
        gpu: Name of the one that it takes; "" without.
        cpus: CPUs that it may run on.
        threads: Threads it computes with.
        workers: Decoding processes it would have by default.
        shm_free, disk_free: Bytes.
        open_files: How many it may open.
        folder_error, data_error: Why the run folder or the data cannot be used; "" if they can, or were not named.
        data_entries: Names in the data folder; None if it was not named.
        clock: Seconds since 1970, read when all ranks had met.
        networks: Interface -> its IPv4 address with the network's prefix.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    host: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    horovod_error: str = ""
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


# What one rank finds out


def horovod_error() -> str:
    """Why horovod.torch cannot be imported; "" if it can.

    Horovod itself says "has not been built" whatever the reason was; the loader of its library knows better.
    """
    try:
        import horovod.torch  # noqa: F401
    except Exception as error:
        told = f"{error}".strip().split("\n")[0]
    else:
        return ""
    package = importlib.util.find_spec("horovod")
    if package is None or package.origin is None:
        return told
    library = next(Path(package.origin).parent.glob("torch/mpi_lib*.so"), None)
    if library is None:
        return f"{told} (it was built without PyTorch)"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return told


def mpi_version() -> str:
    """Name and version of the MPI that mpi4py speaks to; "" if it cannot be loaded."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return ""
    return " ".join(MPI.Get_library_version().strip("\0").split("\n")[0].split(",")[0].split())


def networks() -> dict[str, str]:
    """Interface -> IPv4 address/prefix, of those that are up; loopback is left out."""
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
    """Why a folder that need not exist yet cannot be written; "" if it can."""
    there = existing(folder)
    if not there.is_dir():
        return f"{there} is not a folder"
    try:  # the superuser's rights say nothing: of /proc, or of a file system that is read-only
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        return f"{there} cannot be written: {error.strerror}"
    return ""


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if os.path.exists(path))


def look(world: Any, log_dir: Path, data_dir: Path | None) -> Facts:
    """Collect this rank's facts; `world` is lars.comm's."""
    import torch

    from lars import launched
    from lars.optim.cpu import kernels

    error = horovod_error()
    allotted = launched.allotted_cpus()
    facts = Facts(
        rank=world.rank,
        size=world.size,
        local_rank=world.local_rank,
        host=socket.gethostname(),
        horovod_error=error,
        kernels_error=kernels.lacking(),
        cuda_build=torch.version.cuda is not None,
        gpus=torch.cuda.device_count(),
        cpus=sorted(os.sched_getaffinity(0)),
        threads=int(os.environ.get("OMP_NUM_THREADS") or allotted),
        workers=allotted - 1,
        shm_free=shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        disk_free=shutil.disk_usage(existing(log_dir)).free,
        folder_error=folder_problem(log_dir),
        networks=networks(),
    )
    if os.environ.get("SLURM_CPUS_PER_TASK", "").isdigit():
        facts.cpus_per_task = int(os.environ["SLURM_CPUS_PER_TASK"])
    facts.versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "Horovod": "",
        "MPI": mpi_version(),
    }
    if not error:
        import horovod
        import horovod.torch as hvd

        facts.versions["Horovod"] = horovod.__version__
        facts.built = {
            "MPI": bool(hvd.mpi_built()),
            "Gloo": bool(hvd.gloo_built()),
            "NCCL": bool(hvd.nccl_built()),
        }
    facts.loaded_mpis = sorted(loaded_mpis())
    if facts.local_rank < facts.gpus:
        facts.gpu = torch.cuda.get_device_name(facts.local_rank)
    if data_dir is not None:
        try:
            facts.data_entries = len(os.listdir(data_dir))
        except OSError as error:
            facts.data_error = f"{data_dir}: {error.strerror}"
    world.barrier("doctor.clock")
    facts.clock = time.time()
    return facts


# What the facts mean. Every check takes the facts of all ranks, by rank.


def hosts_of(ranks: Sequence[Facts]) -> dict[str, list[Facts]]:
    """Host -> facts of its ranks."""
    hosts: dict[str, list[Facts]] = {}
    for facts in ranks:
        hosts.setdefault(facts.host, []).append(facts)
    return hosts


def check_versions(ranks: Sequence[Facts]) -> Row:
    told = ", ".join(
        f"{name} {version or 'missing'}" for name, version in ranks[0].versions.items()
    )
    for facts in ranks:
        for name, version in facts.versions.items():
            if version != ranks[0].versions[name]:
                where = f"{name} is {version or 'missing'} on rank {facts.rank} ({facts.host})"
                fix = "all hosts need the same .venv: put the clone on a shared file system"
                return Row("versions", WRONG, f"{where}, {ranks[0].versions[name]} on rank 0", fix)
    return Row("versions", OK, told)


def check_horovod(ranks: Sequence[Facts]) -> Row:
    for facts in ranks:
        if facts.horovod_error:
            state = WRONG if facts.size > 1 or facts.world_error else WARNING
            fix = "run ./launch/setup.sh; without Horovod only a world of one can train"
            return Row("Horovod", state, f"{facts.horovod_error} (on {facts.host})", fix)
    built = ranks[0].built
    told = ", ".join(name if there else f"no {name}" for name, there in built.items())
    if not built.get("MPI"):
        return Row("Horovod", WRONG, told, "put mpicc on the PATH, then ./launch/setup.sh --fresh")
    if ranks[0].gpus and ranks[0].cuda_build and not built.get("NCCL"):
        fix = "./launch/setup.sh --gpu --fresh; without NCCL gradients go through the host"
        return Row("Horovod", WARNING, told, fix)
    return Row("Horovod", OK, told)


def check_kernels(ranks: Sequence[Facts]) -> Row:
    for facts in ranks:
        if facts.kernels_error:
            fix = "install gcc; or share ~/.cache with a host that has it; without, steps on CPUs are slower"
            return Row("CPU kernels", WARNING, f"{facts.kernels_error} (on {facts.host})", fix)
    return Row("CPU kernels", OK, "compiled")


def check_world(ranks: Sequence[Facts]) -> Row:
    wrong = next((facts.world_error for facts in ranks if facts.world_error), "")
    if wrong:
        return Row("ranks", WRONG, wrong, "start them with that MPI's mpirun, or srun --mpi=pmix")
    return Row("ranks", OK, f"{len(ranks)} on {len(hosts_of(ranks))} host(s)")


def check_mpis(ranks: Sequence[Facts]) -> Row:
    for facts in ranks:
        if len(facts.loaded_mpis) > 1:
            found = f"{' and '.join(facts.loaded_mpis)} in one process (rank {facts.rank})"
            fix = (
                "rebuild Horovod and mpi4py for one MPI: load its module, ./launch/setup.sh --fresh"
            )
            return Row("MPI libraries", WRONG, found, fix)
    return Row("MPI libraries", OK, ", ".join(ranks[0].loaded_mpis) or "none loaded")


def check_gpus(ranks: Sequence[Facts]) -> Row:
    fewest, most = min(f.gpus for f in ranks), max(f.gpus for f in ranks)
    if most == 0:
        if ranks[0].cuda_build:
            fix = "training would run on the CPU: look at nvidia-smi, CUDA_VISIBLE_DEVICES, --gpus-per-node"
            return Row("GPUs", WARNING, "none is visible", fix)
        return Row("GPUs", OK, "none, and torch is a CPU build")
    if fewest == 0:
        without = ", ".join(sorted({f.host for f in ranks if f.gpus == 0}))
        fix = (
            "CUDA_VISIBLE_DEVICES must not be passed on from another host; look at nvidia-smi there"
        )
        return Row("GPUs", WRONG, f"none on {without}, {most} elsewhere", fix)
    for host, here in hosts_of(ranks).items():
        if len(here) > here[0].gpus:
            fix = "start one rank per GPU: -np, or --ntasks-per-node"
            return Row("GPUs", WRONG, f"{len(here)} ranks for {here[0].gpus} on {host}", fix)
        if len(here) < here[0].gpus and here[0].size > 1:
            fix = "start one rank per GPU, if the others are yours"
            return Row("GPUs", WARNING, f"{len(here)} ranks for {here[0].gpus} on {host}", fix)
    return Row("GPUs", OK, f"{ranks[0].gpu}; one for each rank")


def check_cpus(ranks: Sequence[Facts]) -> Row:
    for host, here in hosts_of(ranks).items():
        cpus = {cpu for facts in here for cpu in facts.cpus}
        threads = sum(facts.threads for facts in here)
        told = f"{len(here)} ranks x {here[0].threads} threads on {len(cpus)} CPUs of {host}"
        for facts in here:
            if facts.cpus_per_task and len(facts.cpus) < facts.cpus_per_task:
                found = f"rank {facts.rank} may use {len(facts.cpus)} of {facts.cpus_per_task} CPUs per task"
                return Row(
                    "CPUs", WRONG, found, "give srun --cpus-per-task too; some Slurms forget it"
                )
            if facts.threads > len(facts.cpus):
                found = f"rank {facts.rank} on {host}: {facts.threads} threads on {len(facts.cpus)} CPUs"
                fix = "mpirun --bind-to none, launch/mpirun.sh --cpus-per-rank, or a lower OMP_NUM_THREADS"
                return Row("CPUs", WRONG, found, fix)
        if threads > len(cpus):
            fix = f"OMP_NUM_THREADS={max(1, len(cpus) // len(here))}, or fewer ranks"
            return Row("CPUs", WARNING, told, fix)
    return Row("CPUs", OK, told)


def check_shared_memory(ranks: Sequence[Facts]) -> Row:
    for host, here in hosts_of(ranks).items():
        workers = sum(facts.workers for facts in here)
        free, needed = here[0].shm_free, SHARED_PER_WORKER * workers
        if free < needed:
            found = f"{free // MEBI} MiB free on {host}; {needed // MEBI} MiB for {workers} workers"
            fix = "docker run --ipc=host or --shm-size=16g; or fewer --workers"
            return Row("/dev/shm", WRONG if free < 64 * MEBI else WARNING, found, fix)
    return Row("/dev/shm", OK, f"{min(f.shm_free for f in ranks) // MEBI} MiB free")


def check_open_files(ranks: Sequence[Facts]) -> Row:
    least = min(ranks, key=lambda f: f.open_files)
    needed = 512 + 64 * least.workers
    if 0 <= least.open_files < needed:
        found = f"at most {least.open_files} on {least.host}; {needed} for {least.workers} workers"
        return Row(
            "open files", WRONG, found, f"ulimit -n {max(4096, needed)} before mpirun or sbatch"
        )
    return Row(
        "open files", OK, "unlimited" if least.open_files < 0 else f"at most {least.open_files}"
    )


def check_run_folder(ranks: Sequence[Facts]) -> Row:
    for facts in ranks:
        if facts.folder_error:
            found = f"{facts.folder_error} (on {facts.host})"
            return Row(
                "run folder", WRONG, found, "give --log-dir a folder that every host can write"
            )
    free = min(f.disk_free for f in ranks)
    found = f"{free / 10**9:.1f} GB free"
    if free < 6 * CHECKPOINT_BYTES:
        state = WRONG if free < 2 * CHECKPOINT_BYTES else WARNING
        fix = "make room, or give another --log-dir: ResNet-50 keeps 3 to 5 checkpoints of 0.2 GB"
        return Row("run folder", state, found, fix)
    return Row("run folder", OK, found)


def check_data(ranks: Sequence[Facts]) -> Row:
    wrong = next((f"{f.data_error} (on {f.host})" for f in ranks if f.data_error), "")
    fix = "every host must see the same data: a shared file system, or a copy on each"
    if wrong:
        return Row("data", WRONG, wrong, fix)
    if ranks[0].data_entries is None:
        return Row("data", OK, "not asked for: give --data-dir")
    if ranks[0].data_entries == 0:
        return Row("data", WRONG, "the folder is empty", "python -m data.prepare --help")
    for facts in ranks:
        if facts.data_entries != ranks[0].data_entries:
            found = f"{facts.data_entries} entries on {facts.host}, {ranks[0].data_entries} on {ranks[0].host}"
            return Row("data", WRONG, found, fix)
    return Row("data", OK, f"{ranks[0].data_entries} entries")


def check_clocks(ranks: Sequence[Facts]) -> Row:
    first, last = (pick(ranks, key=lambda f: f.clock) for pick in (min, max))
    apart = last.clock - first.clock
    found = f"{apart:.2f} s apart"
    if apart > 2:
        state = WRONG if apart > 60 else WARNING
        return Row(
            "clocks",
            state,
            f"{found} ({first.host}, {last.host})",
            "run chrony or ntpd on the hosts",
        )
    return Row("clocks", OK, found)


def shared_interfaces(ranks: Sequence[Facts]) -> list[str]:
    """Interfaces through which all hosts reach each other: of one network, with an address each.

    Bridges such as docker0 have the same address on every host, and lead nowhere.
    """
    hosts = [here[0].networks for here in hosts_of(ranks).values()]
    found = []
    for name, address in hosts[0].items():
        theirs = [ipaddress.ip_interface(networks[name]) for networks in hosts if name in networks]
        one_network = len({one.network for one in theirs}) == 1
        if len(theirs) == len(hosts) == len({one.ip for one in theirs}) and one_network:
            found.append(f"{name} ({address})")
    return found


def check_interfaces(ranks: Sequence[Facts]) -> Row:
    if len(hosts_of(ranks)) == 1:
        return Row("interface", OK, "one host needs none")
    shared = shared_interfaces(ranks)
    every = {name for f in ranks for name in f.networks}
    if not shared:
        found = f"no network is shared by all hosts under one name: {', '.join(sorted(every))}"
        return Row(
            "interface", WARNING, found, "ask for the network's name and give --interface NAME"
        )
    first = shared[0].split()[0]
    if len(every) > 1:
        fix = f"if the ranks do not meet, or are slow: launch/mpirun.sh --interface {first}"
        return Row("interface", WARNING, f"{', '.join(shared)}, among {len(every)}", fix)
    return Row("interface", OK, shared[0])


CHECKS: tuple[Callable[[Sequence[Facts]], Row], ...] = (
    check_versions, check_horovod, check_kernels, check_world, check_mpis, check_gpus, check_cpus, check_shared_memory,
    check_open_files, check_run_folder, check_data, check_clocks, check_interfaces,
)  # fmt: skip


def check_fabric(right: bool, seconds: Sequence[float], size: int, hosts: int) -> Row:
    """Judge allreduces of `ALLREDUCE_BYTES`.

    A ring sends 2 (size - 1) / size of the bytes over every link, which makes the bus bandwidth.
    """
    if size == 1:
        return Row("allreduce", OK, "one rank needs none")
    median = statistics.median(seconds)
    bandwidth = ALLREDUCE_BYTES / median * 2 * (size - 1) / size
    found = f"{ALLREDUCE_BYTES // MEBI} MiB in {median:.3f} s: {bandwidth / 10**9:.2f} GB/s of bus bandwidth"
    if not right:
        return Row(
            "allreduce", WRONG, "the sum is wrong", "rebuild Horovod: ./launch/setup.sh --fresh"
        )
    if hosts > 1 and bandwidth < SLOW_BYTES_PER_SECOND:
        fix = "is it the right network? launch/mpirun.sh --interface NAME, and launch/README.md"
        return Row("allreduce", WARNING, found, fix)
    return Row("allreduce", OK, found)


# The doctor


def measure_fabric(world: Any, repeats: int = 3) -> tuple[bool, list[float]]:
    """Sum a big tensor over the ranks, on the device that gradients would be on; whether it is right, and seconds."""
    import torch

    device = torch.device("cpu")
    if world.local_rank < torch.cuda.device_count():
        device = torch.device("cuda", world.local_rank)
    values = torch.full((ALLREDUCE_BYTES // 4,), world.rank + 1.0, device=device)
    right, seconds = True, []
    for i in range(repeats + 1):
        began = time.perf_counter()
        total = world.sum(values, f"doctor.fabric.{i}")
        right &= bool((total == world.size * (world.size + 1) / 2).all())
        seconds.append(time.perf_counter() - began)
    return right, seconds[1:]  # the first one sets up the connections


@contextmanager
def within(seconds: float, what: str, advice: str) -> Iterator[None]:
    """End the process with `advice` if the block takes longer: a rank that waits for others cannot be interrupted."""

    def give_up() -> None:
        print(
            f"doctor: {what} took over {seconds:g} s on {socket.gethostname()}; {advice}",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def rank_table(ranks: Sequence[Facts]) -> str:
    """Where every rank is: host, local rank, GPU, CPUs."""
    lines = [("rank", "host", "local rank", "GPU", "threads", "CPUs")]
    for facts in ranks:
        gpu = f"{facts.local_rank}: {facts.gpu}" if facts.gpu else "none"
        cells = (facts.rank, facts.host, facts.local_rank, gpu, facts.threads, ranges(facts.cpus))
        lines.append(tuple(str(cell) for cell in cells))
    return aligned(lines)


def findings(rows: Sequence[Row]) -> str:
    """The table of what was found, every fix under its row."""
    lines = aligned([(row.state, row.what, row.found) for row in rows]).split("\n")
    return "\n".join(
        line + (f"\n         -> {row.fix}" if row.fix else "")
        for line, row in zip(lines, rows, strict=True)
    )


def aligned(lines: Sequence[tuple[str, ...]]) -> str:
    """Columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Look, meet the other ranks, judge; the root prints. Returns 1 if anything is wrong, on every rank."""
    parser = argparse.ArgumentParser(prog="python -m launch.doctor", description=__doc__)
    parser.add_argument(
        "--data-dir", type=Path, help="a folder of images or records that all ranks need"
    )
    parser.add_argument(
        "--log-dir", type=Path, default=Path("logs"), help="where runs will be written"
    )
    said = parser.parse_args(argv)

    from lars import comm, launched
    from lars.config import UsageError

    advice = "is it the right network (launch/mpirun.sh --interface), and can the hosts reach each other?"
    world, world_error = comm.World(), ""
    with within(PATIENCE, "meeting the other ranks", advice):
        try:
            world = comm.start()
        except UsageError as error:
            world_error = str(error)
        mine = look(world, said.log_dir, said.data_dir)
        mine.world_error = world_error
        ranks = world.gather_objects(mine, "doctor.facts")
        rows = [check(ranks) for check in CHECKS]
        right, seconds = measure_fabric(world) if world.size > 1 else (True, [])
        right = all(world.gather_objects(right, "doctor.right"))
    rows.append(check_fabric(right, seconds, world.size, len(hosts_of(ranks))))
    if world.is_root and (not world_error or launched.rank() == 0):
        print(f"{rank_table(ranks)}\n\n{findings(rows)}", flush=True)
    return 1 if any(row.state == WRONG for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
