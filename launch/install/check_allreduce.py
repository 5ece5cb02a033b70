"""Check that Horovod sums over all ranks: ``mpirun -np 2 python launch/install/check_allreduce.py``."""

import socket
import sys


def loaded_mpis() -> set[str]:
    """The MPI libraries loaded in this process; two different ones corrupt each other."""
    with open("/proc/self/maps") as maps:
        files = {line.split(maxsplit=5)[-1].strip() for line in maps}
    return {file for file in files if file.rpartition("/")[2].startswith(("libmpi.", "libmpich."))}


def main() -> int:
    """Compare the result of an allreduce with the expected sum; the root prints one line."""
    import horovod.torch as hvd
    import torch
    from mpi4py import MPI

    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    total = hvd.allreduce(torch.full((1000,), rank + 1.0), op=hvd.Sum, name="check")
    errors = []
    if size != MPI.COMM_WORLD.Get_size():
        errors.append(f"Horovod sees {size} ranks, mpi4py sees {MPI.COMM_WORLD.Get_size()}")
    if not torch.equal(total, torch.full((1000,), size * (size + 1) / 2)):
        errors.append(
            f"the allreduce returned {total[0].item()} instead of {size * (size + 1) / 2}"
        )
    if len(loaded_mpis()) != 1:
        errors.append(f"the process must load one MPI library, but loaded {sorted(loaded_mpis())}")
    for error in errors:
        print(f"rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr)
    if rank == 0 and not errors:
        first_line = MPI.Get_library_version().strip("\0").split("\n")[0]
        mpi = " ".join(first_line.split(",")[0].split())
        nccl = "with" if hvd.nccl_built() else "without"
        print(f"{size} ranks: allreduce is correct (Horovod over {mpi}, {nccl} NCCL)", flush=True)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
