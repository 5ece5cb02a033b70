"""A fork server that has touched neither MPI nor CUDA."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from data import DataError, loading
from data.synthetic import Synthetic
from data.transforms import ValTransform

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


class Devices:
    """Samples labelled by whether the process that reads them may see a GPU."""

    def __len__(self) -> int:
        return 2

    def read(self, index, choose):
        label = int(os.environ.get("CUDA_VISIBLE_DEVICES") != "")
        return np.zeros((8, 8, 3), np.uint8), label


def test_workers_open_no_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for workers, label in ((1, 0), (0, 1)):
        loader = loading.ValLoader(
            loading.Reader(Devices(), ValTransform(8, 8)), 2, rank=0, size=1, workers=workers
        )
        assert [labels.tolist() for _, labels in loader] == [[label, label]]


class Memory:
    """What statvfs says of a small /dev/shm."""

    f_frsize = 4096

    def __init__(self, free: int) -> None:
        self.f_bavail = free // self.f_frsize


SOURCE = Synthetic(image_size=64, num_classes=3, train_size=40, val_size=40)
BATCH_BYTES = 8 * 3 * 64 * 64


def make_train(workers, batch_size=8):
    return SOURCE.train_loader(batch_size=batch_size, effective_batch_size=16, drop_last=False,
                               rank=0, size=1, seed=0, workers=workers)  # fmt: skip


def make_val(workers, batch_size=8):
    return SOURCE.val_loader(batch_size=batch_size, rank=0, size=1, workers=workers)


@pytest.mark.parametrize(("make", "flag"), [(make_train, "batch"), (make_val, "val-batch")])
def test_batches_must_fit_into_shared_memory(monkeypatch, make, flag):
    seen = []
    # Room for 5 batches, which is what 2 workers need: 2 each ahead, and the one in use.
    memory = Memory(5 * BATCH_BYTES)
    monkeypatch.setattr(os, "statvfs", lambda path: seen.append(path) or memory)
    make(2)
    make(0, batch_size=16)  # no other process, no shared memory
    assert seen == ["/dev/shm"]
    for workers, batch_size in ((3, 8), (2, 9)):
        with pytest.raises(DataError, match=rf"--workers {workers} needs 1 MB.*or --{flag}-size"):
            make(workers, batch_size)


def test_without_shared_memory_of_that_name_nothing_is_checked(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "statvfs", missing)
    make_train(2)
