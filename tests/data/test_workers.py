"""Workers come from a fork server that has initialised neither MPI nor CUDA."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT
from data import DataError
from data.loader.reader import Reader
from data.loader.torch_loader import ValLoader
from data.pixels.transforms import ValTransform
from data.sources.noise import Synthetic
from data_fixtures import Share

PROGRAM = """
import sys
from data.loader.workers import start_forkserver

if __name__ == "__main__":
    start_forkserver()
    import os
    from multiprocessing import forkserver
    pid = forkserver._forkserver._forkserver_pid
    from mpi4py import MPI
    from data.sources.noise import Synthetic
    from data_fixtures import Share
    source = Synthetic(image_size=8, num_classes=3, train_size=40, val_size=4)
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    loader = source.train_loader(Share(rank, size, effective_batch_size=16), 2)
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
    paths = f"{ROOT}:{ROOT / 'tests'}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.count("fine") == 2, done.stderr


class Devices:
    """Samples whose label is 1 if the process that reads them may see a GPU."""

    def __len__(self) -> int:
        return 2

    def read(self, index, crop_fn):
        label = int(os.environ.get("CUDA_VISIBLE_DEVICES") != "")
        return np.zeros((8, 8, 3), np.uint8), label


def test_workers_open_no_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for workers, label in ((1, 0), (0, 1)):
        reader = Reader(Devices(), ValTransform(8, 8))
        loader = ValLoader(reader, Share(val_batch_size=2), workers)
        assert [labels.tolist() for _, labels in loader] == [[label, label]]


class Memory:
    """What statvfs returns for a small /dev/shm."""

    f_frsize = 4096

    def __init__(self, free: int) -> None:
        self.f_bavail = free // self.f_frsize


SOURCE = Synthetic(image_size=64, num_classes=3, train_size=40, val_size=40)
BATCH_BYTES = 8 * 3 * 64 * 64


def make_train(workers, batch_size=8):
    return SOURCE.train_loader(Share(batch_size=batch_size, effective_batch_size=16), workers)


def make_val(workers, batch_size=8):
    return SOURCE.val_loader(Share(val_batch_size=batch_size), workers)


@pytest.mark.parametrize(("make", "flag"), [(make_train, "batch"), (make_val, "val-batch")])
def test_batches_must_fit_into_shared_memory(monkeypatch, make, flag):
    seen = []
    # There is room for 5 batches, exactly what 2 workers need: 2 each, and the one in use.
    memory = Memory(5 * BATCH_BYTES)
    monkeypatch.setattr(os, "statvfs", lambda path: seen.append(path) or memory)
    make(2)
    make(0, batch_size=16)  # without other processes no shared memory is needed
    assert seen == ["/dev/shm"]
    for workers, batch_size in ((3, 8), (2, 9)):
        with pytest.raises(DataError, match=rf"--workers {workers} needs 1 MB.*or --{flag}-size"):
            make(workers, batch_size)


def test_nothing_is_checked_if_that_folder_does_not_exist(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "statvfs", missing)
    make_train(2)
