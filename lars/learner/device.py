"""The device and the CPUs that a rank uses."""

from __future__ import annotations

import ctypes
import os
import socket

import torch

from lars import launcher
from lars.comm.world import World
from lars.config.config import Config
from lars.errors import UsageError

# Parameters of glibc's mallopt (malloc.h) and the values in bytes that they are set to.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = (-1, 2**31 - 1), (-2, 256 << 20), (-3, 2**31 - 1)


def on_cpu(no_cuda: bool) -> bool:
    """Whether training uses the CPU."""
    return no_cuda or not torch.cuda.is_available()


def pick_device(no_cuda: bool, world: World) -> torch.device:
    """This rank's GPU, or the CPU.

    Raises:
        UsageError: The host has fewer GPUs than ranks.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(launcher.allotted_cpus())
    if on_cpu(no_cuda):
        keep_freed_memory()
        return torch.device("cpu")
    number = gpu_number(world, [gpu_name(i) for i in range(torch.cuda.device_count())])
    torch.cuda.set_device(number)
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda", number)


def gpu_name(number: int) -> str:
    """The unique identifier of a GPU. It does not depend on CUDA_VISIBLE_DEVICES."""
    return str(torch.cuda.get_device_properties(number).uuid)


def gpu_number(world: World, visible: list[str]) -> int:
    """Which of the visible GPUs this rank uses: the one with the number of its local rank, or the only one.

    A launcher may show each rank only one GPU (Slurm's --gpus-per-task=1). So the ranks compare the identifiers.

    Raises:
        UsageError: Two ranks of a host would use the same GPU, or a rank has none.
    """
    number = 0 if len(visible) == 1 else world.local_rank
    mine = (socket.gethostname(), visible[number]) if number < len(visible) else None
    used = world.all_gather_object(mine, "GPUs")
    if None in used or len(set(used)) < len(used):
        raise UsageError(
            f"a host has fewer GPUs than ranks (rank {world.rank} sees {len(visible)}); "
            "start one rank per GPU, or use --no-cuda"
        )
    return number


def keep_freed_memory() -> None:
    """Let glibc keep the large blocks that each step frees, instead of returning them to the kernel.

    This avoids page faults in every step. If the user has set a MALLOC_ variable, nothing is changed.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in (_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD):
            mallopt(parameter, value)


def return_freed_memory() -> None:
    """Return freed memory, such as that of a loaded checkpoint, to the kernel; see `keep_freed_memory`."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def worker_count(config: Config) -> int:
    """The number of decoding processes of this rank.

    Raises:
        UsageError: Two flags contradict each other.
    """
    if config.single_threaded:
        if config.workers:
            raise UsageError(
                f"--single-threaded means --workers 0, but --workers is {config.workers}; use only one of the two flags"
            )
        return 0
    return launcher.allotted_cpus() - 1 if config.workers is None else config.workers
