"""What the facts mean. Each check takes the facts of all ranks, in the order of their ranks, and returns one row."""

from __future__ import annotations

import ipaddress
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from launch.doctor.facts import NOT_INSTALLED, Facts, hosts_of

OK, WARNING, WRONG = "OK", "warning", "wrong"
MEBI = 1 << 20
# A decoding process keeps about two batches of 128 images of 224 px in shared memory.
SHARED_PER_WORKER = 2 * 128 * 3 * 224 * 224
# One checkpoint of ResNet-50: its weights, momentum and BatchNorm statistics.
CHECKPOINT_BYTES = 205 * 10**6
ALLREDUCE_BYTES = 100 * MEBI
SLOW_BYTES_PER_SECOND = 10**9 // 8  # the speed of 1 Gbit/s Ethernet


class Row(NamedTuple):
    """The result of one check: its name, its state (OK, warning or wrong), what it found, and how to fix it."""

    what: str
    state: str
    found: str
    fix: str = ""


def check_versions(ranks: Sequence[Facts]) -> Row:
    """All ranks must run the same software."""
    for facts in ranks:
        for name, version in facts.versions.items():
            if version != ranks[0].versions[name]:
                where = f"{name} is {version or 'missing'} on rank {facts.rank} ({facts.host})"
                fix = "all hosts need the same .venv: put the clone on a shared file system"
                return Row("versions", WRONG, f"{where}, {ranks[0].versions[name]} on rank 0", fix)
    versions = ranks[0].versions.items()
    found = ", ".join(f"{name} {version or 'missing'}" for name, version in versions)
    return Row("versions", OK, found)


def check_backend(ranks: Sequence[Facts]) -> Row:
    """Report the backend. Several ranks have connected already, so there is nothing to test."""
    if ranks[0].size > 1:
        return Row("backend", OK, ranks[0].backend)
    launchers: dict[str, list[str]] = {}
    for launcher, backend in ranks[0].backends.items():
        launchers.setdefault(backend, []).append(launcher)
    found = (f"{backend} with {', '.join(names)}" for backend, names in launchers.items())
    return Row("backend", OK, "; ".join(found) or "none")


def check_torch_distributed(ranks: Sequence[Facts]) -> Row:
    """torch.distributed must be able to connect two ranks on each host, over Gloo."""
    for facts in ranks:
        if facts.gloo_error:
            state = WARNING if facts.backend == "Horovod" else WRONG
            fix = (
                "set GLOO_SOCKET_IFNAME to a network interface of this host, for example lo or eth0"
            )
            return Row("torch.distributed", state, f"{facts.gloo_error} (on {facts.host})", fix)
    return Row("torch.distributed", OK, "two ranks on this host can communicate over Gloo")


def check_horovod(ranks: Sequence[Facts]) -> Row:
    """If Horovod is installed, it must work. Jobs of mpirun use it, with MPI, and with NCCL if there are GPUs."""
    for facts in ranks:
        if facts.horovod_error and facts.horovod_error != NOT_INSTALLED:
            state = WRONG if facts.world_error else WARNING
            fix = "run ./launch/setup.sh, or train with --backend torch"
            return Row("Horovod", state, f"{facts.horovod_error} (on {facts.host})", fix)
    if ranks[0].horovod_error:
        return Row("Horovod", OK, "not installed; jobs use torch.distributed")
    built = ranks[0].built
    found = ", ".join(name if present else f"no {name}" for name, present in built.items())
    if not built.get("MPI"):
        return Row("Horovod", WRONG, found, "put mpicc on the PATH, then ./launch/setup.sh --fresh")
    if ranks[0].gpus and ranks[0].cuda_build and not built.get("NCCL"):
        fix = "./launch/setup.sh --gpu --fresh, or --backend torch; otherwise gradients pass through host memory"
        return Row("Horovod", WARNING, found, fix)
    return Row("Horovod", OK, found)


def check_kernels(ranks: Sequence[Facts]) -> Row:
    """The optimizers' CPU kernels should be compiled."""
    for facts in ranks:
        if facts.kernels_error:
            fix = "install gcc, or share ~/.cache with a host that has it; CPU steps are slower without"
            return Row("CPU kernels", WARNING, f"{facts.kernels_error} (on {facts.host})", fix)
    return Row("CPU kernels", OK, "compiled")


def check_world(ranks: Sequence[Facts]) -> Row:
    """The ranks must see each other."""
    error = next((facts.world_error for facts in ranks if facts.world_error), "")
    if error:
        fix = "start the ranks with launch/mpirun.sh, srun or torchrun"
        return Row("ranks", WRONG, error, fix)
    return Row("ranks", OK, f"{len(ranks)} on {len(hosts_of(ranks))} host(s)")


def check_mpis(ranks: Sequence[Facts]) -> Row:
    """Two MPI libraries in one process corrupt each other."""
    for facts in ranks:
        if len(facts.loaded_mpis) > 1:
            found = f"{' and '.join(facts.loaded_mpis)} in one process (rank {facts.rank})"
            fix = "load the module of one MPI, then rebuild Horovod and mpi4py: ./launch/setup.sh --fresh"
            return Row("MPI libraries", WRONG, found, fix)
    return Row("MPI libraries", OK, ", ".join(ranks[0].loaded_mpis) or "none loaded")


def check_gpus(ranks: Sequence[Facts]) -> Row:
    """Each rank needs a GPU of its own, or no rank has one."""
    fewest, most = min(f.gpus for f in ranks), max(f.gpus for f in ranks)
    if most == 0:
        if ranks[0].cuda_build:
            fix = "training would run on the CPU: check nvidia-smi, CUDA_VISIBLE_DEVICES and --gpus-per-node"
            return Row("GPUs", WARNING, "none is visible", fix)
        return Row("GPUs", OK, "none, and torch is a CPU build")
    if fewest == 0:
        without = ", ".join(sorted({f.host for f in ranks if f.gpus == 0}))
        fix = "check nvidia-smi there; CUDA_VISIBLE_DEVICES must not be passed on from another host"
        return Row("GPUs", WRONG, f"none on {without}, {most} elsewhere", fix)
    for host, here in hosts_of(ranks).items():
        if len(here) > here[0].gpus:
            fix = "start one rank per GPU: -np, or --ntasks-per-node"
            return Row("GPUs", WRONG, f"{len(here)} ranks for {here[0].gpus} on {host}", fix)
        if len(here) < here[0].gpus and here[0].size > 1:
            fix = "start one rank per GPU, if you may use the other GPUs"
            return Row("GPUs", WARNING, f"{len(here)} ranks for {here[0].gpus} on {host}", fix)
    return Row("GPUs", OK, f"{ranks[0].gpu}; one for each rank")


def check_cpus(ranks: Sequence[Facts]) -> Row:
    """The threads of a host's ranks should not exceed its CPUs."""
    found = ""
    for host, here in hosts_of(ranks).items():
        for facts in here:
            if facts.cpus_per_task and len(facts.cpus) < facts.cpus_per_task:
                found = f"rank {facts.rank} may use {len(facts.cpus)} of {facts.cpus_per_task} CPUs per task"
                fix = "pass --cpus-per-task to srun too; some versions of Slurm do not inherit it"
                return Row("CPUs", WRONG, found, fix)
            if facts.threads > len(facts.cpus):
                found = f"rank {facts.rank} on {host}: {facts.threads} threads on {len(facts.cpus)} CPUs"
                fix = "mpirun --bind-to none, launch/mpirun.sh --cpus-per-rank, or a lower OMP_NUM_THREADS"
                return Row("CPUs", WRONG, found, fix)
        cpus = {cpu for facts in here for cpu in facts.cpus}
        found = f"{len(here)} ranks x {here[0].threads} threads on {len(cpus)} CPUs of {host}"
        if sum(facts.threads for facts in here) > len(cpus):
            fix = f"OMP_NUM_THREADS={max(1, len(cpus) // len(here))}, or fewer ranks"
            return Row("CPUs", WARNING, found, fix)
    return Row("CPUs", OK, found)


def check_shared_memory(ranks: Sequence[Facts]) -> Row:
    """Decoding processes hand their batches over in /dev/shm."""
    for host, here in hosts_of(ranks).items():
        workers = sum(facts.workers for facts in here)
        free, needed = here[0].shm_free, SHARED_PER_WORKER * workers
        if free < needed:
            found = (
                f"{free // MEBI} MiB free on {host}, {workers} workers need {needed // MEBI} MiB"
            )
            fix = "docker run --ipc=host or --shm-size=16g; or fewer --workers"
            return Row("/dev/shm", WRONG if free < 64 * MEBI else WARNING, found, fix)
    return Row("/dev/shm", OK, f"{min(f.shm_free for f in ranks) // MEBI} MiB free")


def check_open_files(ranks: Sequence[Facts]) -> Row:
    """Each decoding process needs some file descriptors."""
    least = min(ranks, key=lambda f: f.open_files if f.open_files >= 0 else math.inf)
    needed = 512 + 64 * least.workers
    if 0 <= least.open_files < needed:
        found = f"at most {least.open_files} on {least.host}, {least.workers} workers need {needed}"
        fix = f"ulimit -n {max(4096, needed)} before mpirun or sbatch"
        return Row("open files", WRONG, found, fix)
    found = "unlimited" if least.open_files < 0 else f"at most {least.open_files}"
    return Row("open files", OK, found)


def check_run_folder(ranks: Sequence[Facts]) -> Row:
    """The run folder must be writable and have room for checkpoints."""
    for facts in ranks:
        if facts.folder_error:
            found = f"{facts.folder_error} (on {facts.host})"
            fix = "set --log-dir to a folder that every host can write"
            return Row("run folder", WRONG, found, fix)
    free = min(f.disk_free for f in ranks)
    found = f"{free / 10**9:.1f} GB free"
    if free < 6 * CHECKPOINT_BYTES:
        state = WRONG if free < 2 * CHECKPOINT_BYTES else WARNING
        fix = "free some space, or choose another --log-dir: ResNet-50 keeps 3 to 5 checkpoints of 0.2 GB"
        return Row("run folder", state, found, fix)
    return Row("run folder", OK, found)


def check_data(ranks: Sequence[Facts]) -> Row:
    """All hosts must see the same data folder."""
    error = next((f"{f.data_error} (on {f.host})" for f in ranks if f.data_error), "")
    fix = "every host must see the same data: a shared file system, or a copy on each host"
    if error:
        return Row("data", WRONG, error, fix)
    if ranks[0].data_entries is None:
        return Row("data", OK, "not checked; --data-dir DIR checks a folder")
    if ranks[0].data_entries == 0:
        return Row("data", WRONG, "the folder is empty", "python -m data.prepare --help")
    for facts in ranks:
        if facts.data_entries != ranks[0].data_entries:
            found = f"{facts.data_entries} entries on {facts.host}, {ranks[0].data_entries} on {ranks[0].host}"
            return Row("data", WRONG, found, fix)
    return Row("data", OK, f"{ranks[0].data_entries} entries")


def check_clocks(ranks: Sequence[Facts]) -> Row:
    """The clocks of the hosts should agree."""
    first, last = (pick(ranks, key=lambda f: f.clock) for pick in (min, max))
    apart = last.clock - first.clock
    found = f"{apart:.2f} s apart"
    if apart <= 2:
        return Row("clocks", OK, found)
    state = WRONG if apart > 60 else WARNING
    fix = "run chrony or ntpd on the hosts"
    return Row("clocks", state, f"{found} ({first.host}, {last.host})", fix)


def shared_interfaces(ranks: Sequence[Facts]) -> list[str]:
    """Interfaces that connect all hosts: one name and network everywhere, and a different address on each host.

    A bridge such as docker0 has the same address on every host, and connects none of them.
    """
    hosts = [here[0].networks for here in hosts_of(ranks).values()]
    found = []
    for name, address in hosts[0].items():
        others = [ipaddress.ip_interface(networks[name]) for networks in hosts if name in networks]
        one_network = len({one.network for one in others}) == 1
        if len(others) == len(hosts) == len({one.ip for one in others}) and one_network:
            found.append(f"{name} ({address})")
    return found


def check_interfaces(ranks: Sequence[Facts]) -> Row:
    """Several hosts need a network that connects them all, and should not have to guess which."""
    if len(hosts_of(ranks)) == 1:
        return Row("interface", OK, "not needed on one host")
    shared = shared_interfaces(ranks)
    names = {name for f in ranks for name in f.networks}
    if not names:
        return Row("interface", OK, "not checked, because psutil is not installed")
    if not shared:
        found = f"no network connects all hosts under one name: {', '.join(sorted(names))}"
        fix = "find out the name of the network and pass --interface NAME"
        return Row("interface", WARNING, found, fix)
    first = shared[0].split()[0]
    if len(names) > 1:
        fix = f"if the ranks hang at the start or are slow: launch/mpirun.sh --interface {first}"
        return Row("interface", WARNING, f"{', '.join(shared)}, out of {len(names)}", fix)
    return Row("interface", OK, shared[0])


CHECKS: tuple[Callable[[Sequence[Facts]], Row], ...] = (
    check_versions, check_backend, check_torch_distributed, check_horovod, check_kernels, check_world, check_mpis,
    check_gpus, check_cpus, check_shared_memory, check_open_files, check_run_folder, check_data, check_clocks,
    check_interfaces,
)  # fmt: skip


def check_allreduce(correct: bool, seconds: Sequence[float], size: int, hosts: int) -> Row:
    """Judge measured allreduces of `ALLREDUCE_BYTES` by their result and their speed.

    A ring allreduce sends 2 (size - 1) / size of the bytes over every link; this gives the bus bandwidth.
    """
    if size == 1:
        return Row("allreduce", OK, "not needed with one rank")
    if not correct:
        fix = "with Horovod: ./launch/setup.sh --fresh; otherwise look for faulty memory or network"
        return Row("allreduce", WRONG, "the sum is wrong", fix)
    median = statistics.median(seconds)
    bandwidth = ALLREDUCE_BYTES / median * 2 * (size - 1) / size
    found = f"{ALLREDUCE_BYTES // MEBI} MiB in {median:.3f} s: {bandwidth / 10**9:.2f} GB/s of bus bandwidth"
    if hosts > 1 and bandwidth < SLOW_BYTES_PER_SECOND:
        fix = "check that it is the right network: launch/mpirun.sh --interface NAME, and docs/clusters.md"
        return Row("allreduce", WARNING, found, fix)
    return Row("allreduce", OK, found)
