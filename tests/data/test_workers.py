"""Workers come from a fork server that has initialised neither MPI nor CUDA."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from conftest import ROOT
from data import DataError
from data.loader.reader import Reader
from data.loader.torch_loader import ValLoader
from data.loader.workers import start_forkserver
from data.pixels.transforms import ValTransform
from data.sources.noise import Synthetic
from data_fixtures import Share

PROGRAM = """
import sys
import time
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


FROM_ANYWHERE = """
import sys
import time
sys.path[:0] = [ROOT, TESTS]
from data.loader.workers import start_forkserver

if __name__ == "__main__":
    start_forkserver()
    from multiprocessing import forkserver
    from data.sources.noise import Synthetic
    from data_fixtures import Share
    source = Synthetic(image_size=8, num_classes=3, train_size=40, val_size=4)
    loader = source.train_loader(Share(effective_batch_size=16), 1)
    assert sum(len(labels) for _, labels in loader.epoch(0)) == 40
    assert "libtorch" in open(f"/proc/{forkserver._forkserver._forkserver_pid}/maps").read()
    loader.close()
    print("fine")
"""


@pytest.mark.parametrize("shadow", [False, True])
def test_the_server_loads_torch_from_any_folder(tmp_path, shadow):
    """Without that, every worker imports torch itself. A folder `data` here is not ours."""
    program = tmp_path / "elsewhere" / "program.py"
    program.parent.mkdir()
    text = FROM_ANYWHERE.replace("ROOT", repr(str(ROOT))).replace("TESTS", repr(f"{ROOT}/tests"))
    program.write_text(text)
    if shadow:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "__init__.py").write_text("raise ImportError('the wrong one')\n")
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, env=clean | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout == "fine\n", done.stderr


def test_the_environment_is_as_before():
    before = dict(os.environ)
    start_forkserver()
    assert dict(os.environ) == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


UNDER_SIGNALS = """
import os, signal, subprocess, sys
sys.path[:0] = [ROOT, TESTS]
from data.sources.noise import Synthetic
from data_fixtures import Share

if __name__ == "__main__":
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), lambda number, frame: None)  # as the trainer
    source = Synthetic(image_size=8, num_classes=3, train_size=4000, val_size=4)
    source.start_workers(2)
    loader = source.train_loader(Share(batch_size=4, effective_batch_size=4), 2)
    seen = 0
    for _, labels in loader.epoch(0):
        if seen in (0, 100):
            # What a terminal or a batch system sends goes to the workers and to their server too.
            for name in ("INT", "TERM", "USR1", "USR2"):
                subprocess.run(["kill", "-s", name, "--", f"-{os.getpgrp()}"], start_new_session=True)
        seen += len(labels)
    import multiprocessing
    assert seen == 4000, seen
    assert len(multiprocessing.active_children()) == 2
    ENDING
    print("fine")
"""

ENDINGS = {
    "by the loader": "loader.close()",
    "by its parent": """[child.terminate() for child in multiprocessing.active_children()]
    [child.join(10) for child in multiprocessing.active_children()]
    assert not multiprocessing.active_children()""",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_workers_ignore_signals_that_ask_the_job_to_stop(tmp_path, ending):
    """Ctrl-C reaches the whole process group: the trainer still needs its workers to save."""
    text = UNDER_SIGNALS.replace("ENDING", ENDINGS[ending])
    text = text.replace("ROOT", repr(str(ROOT))).replace("TESTS", repr(f"{ROOT}/tests"))
    (tmp_path / "program.py").write_text(text)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False, start_new_session=True,
    )  # fmt: skip
    assert done.stdout == "fine\n", done.stderr
    assert done.returncode == 0
    assert "Traceback" not in done.stderr or ending == "by its parent"
    assert time.monotonic() - began < 60
