"""Where a rank computes, and with how many CPUs."""

from __future__ import annotations

import ctypes
import os

import torch

from lars import launcher
from lars.comm.world import World
from lars.config.config import Config
from lars.errors import UsageError

# Parameters of glibc's mallopt (malloc.h), and what they are set to, in bytes.
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
    if world.local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"{world.local_rank + 1} or more ranks were started on a host with {torch.cuda.device_count()} GPUs; "
            "start one rank per GPU, or give --no-cuda"
        )
    torch.cuda.set_device(world.local_rank)
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda", world.local_rank)


def keep_freed_memory() -> None:
    """Let glibc keep the large blocks that each step frees, instead of returning them to the kernel.

    It saves the page faults of every step. The user's own MALLOC_ variables win.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in (_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD):
            mallopt(parameter, value)


def worker_count(config: Config) -> int:
    """Decoding processes of this rank.

    Raises:
        UsageError: Two flags contradict each other.
    """
    if config.single_threaded:
        if config.workers:
            raise UsageError(
                f"--single-threaded means --workers 0, but --workers {config.workers} is given too"
            )
        return 0
    return launcher.allotted_cpus() - 1 if config.workers is None else config.workers
