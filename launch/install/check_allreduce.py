"""Check that a backend sums over all ranks.

Horovod: ``mpirun -np 2 python launch/install/check_allreduce.py``. torch.distributed, on CPUs:
``torchrun --standalone --nproc-per-node=2 launch/install/check_allreduce.py torch``.
"""

import socket
import sys


def loaded_mpis() -> set[str]:
    """The MPI libraries loaded in this process; two different ones corrupt each other."""
    with open("/proc/self/maps") as maps:
        files = {line.split(maxsplit=5)[-1].strip() for line in maps}
    return {file for file in files if file.rpartition("/")[2].startswith(("libmpi.", "libmpich."))}


def check_horovod() -> tuple[int, int, list[str], str]:
    """Sum with Horovod; returns rank, size, what is wrong, and what was used."""
    import horovod.torch as hvd
    import torch
    from mpi4py import MPI

    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    total = hvd.allreduce(torch.full((1000,), rank + 1.0), op=hvd.Sum, name="check")
    errors = sum_problems(total, size)
    if size != MPI.COMM_WORLD.Get_size():
        errors.append(f"Horovod sees {size} ranks, mpi4py sees {MPI.COMM_WORLD.Get_size()}")
    if len(loaded_mpis()) != 1:
        errors.append(f"the process must load one MPI library, but loaded {sorted(loaded_mpis())}")
    first_line = MPI.Get_library_version().strip("\0").split("\n")[0]
    mpi = " ".join(first_line.split(",")[0].split())
    nccl = "with" if hvd.nccl_built() else "without"
    return rank, size, errors, f"Horovod over {mpi}, {nccl} NCCL"


def check_torch() -> tuple[int, int, list[str], str]:
    """Sum with torch.distributed; returns the same as `check_horovod`."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    total = torch.full((1000,), rank + 1.0)
    dist.all_reduce(total)
    dist.destroy_process_group()
    nccl = "with" if dist.is_nccl_available() else "without"
    return rank, size, sum_problems(total, size), f"torch.distributed over Gloo, {nccl} NCCL"


def sum_problems(total, size: int) -> list[str]:
    """What is wrong with the sum of 1, 2, ... `size` over the ranks, which is a tensor of equal values."""
    expected = size * (size + 1) / 2
    if bool((total == expected).all()):
        return []
    return [f"the allreduce returned {total[0].item()} instead of {expected}"]


def main() -> int:
    """Compare the result of an allreduce with the expected sum; the root prints one line."""
    rank, size, errors, used = check_torch() if "torch" in sys.argv[1:] else check_horovod()
    for error in errors:
        print(f"rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr)
    if rank == 0 and not errors:
        print(f"{size} ranks: allreduce is correct ({used})", flush=True)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
