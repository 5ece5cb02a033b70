"""A fork server that has touched neither MPI nor CUDA."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from data.workers import start_forkserver

if __name__ == "__main__":
    start_forkserver()
    import os
    from multiprocessing import forkserver
    pid = forkserver._forkserver._forkserver_pid
    from mpi4py import MPI
    from data.synthetic import Synthetic
    source = Synthetic(image_size=8, num_classes=3, train_size=40, val_size=4)
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    loader = source.train_loader(batch_size=4, effective_batch_size=16, drop_last=False, rank=rank,
                                 size=size, seed=0, workers=2)
    for epoch in range(2):
        seen = sum(len(labels) for _, labels in loader.epoch(epoch))
        assert MPI.COMM_WORLD.allreduce(seen) == 40
    maps = open(f"/proc/{pid}/maps").read()
    assert "libtorch" in maps and "libmpi" not in maps
    assert forkserver._forkserver._forkserver_pid == pid
    loader.close()
    print("fine")
"""


@pytest.mark.mpi
def test_workers_start_beside_mpi_from_a_process_without_it(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [
        "mpirun",
        "--oversubscribe",
        "-np",
        "2",
        sys.executable,
        str(tmp_path / "program.py"),
    ]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.count("fine") == 2, done.stderr
