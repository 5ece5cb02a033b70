"""Shared parts of the tests: one thread per process, reference numbers, small data sets, real ranks."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from run_folders import end_of

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Use the mpirun of this Python's environment, and allow it to run as root.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
if os.getuid() == 0:
    os.environ |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
# Open MPI 5's mpirun fails if it finds a session folder with its own process id, which a killed mpirun may have left.
# So `environment` gives every mpirun its own folder.
SESSIONS = "PRTE_MCA_prte_tmpdir_base"
os.environ[SESSIONS] = tempfile.mkdtemp(prefix="mpi-", dir="/tmp")  # short, for sockets
atexit.register(shutil.rmtree, os.environ[SESSIONS], ignore_errors=True)

# What a job handles, and ignores at its end. A test that trains within this process must not leave it that way: the
# processes that later tests start would inherit the ignored signals.
HANDLERS = {
    number: signal.getsignal(number)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE)
}


@pytest.fixture(autouse=True)
def _signals_as_at_the_start():
    """Give every test the signal handlers that pytest had at its start."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slow files first. Otherwise some workers of pytest-xdist would wait for the last file of another one."""
    items.sort(key=lambda item: item.path.parent.name not in ("story", "launch"))


ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"


def golden(name: str) -> Any:
    """Read a file of reference numbers."""
    return json.loads((GOLDENS / name).read_text())


def environment(**more: str) -> dict[str, str]:
    """The environment for a process that a test starts. The process may be one mpirun, or start one."""
    session = tempfile.mkdtemp(dir=os.environ[SESSIONS])
    return os.environ | {"PYTHONPATH": str(ROOT), SESSIONS: session} | more


# Prefix for a command that a test interrupts. If a shell or nohup runs the tests in the background, the tests and their
# child processes ignore these signals.
HEARING_SIGNALS = (sys.executable, "-c", """import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
""")  # fmt: skip


def run(
    *command: str | Path, timeout: float = 120, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a command without a terminal and wait for its end. It may fail."""
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment(**more), timeout=timeout,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip


def without_reader(*command: str | Path) -> tuple[int, str]:
    """Run a command whose output nobody reads any more, as in ``... | head``. Return its exit code and its errors."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment(), timeout=120,
        stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writer)
    return done.returncode, done.stderr


class Ranks:
    """Starts Python scripts on several ranks, which communicate with one engine.

    Attributes:
        engine: "horovod" (started by mpirun) or "torch" (torch.distributed, started by torchrun).
    """

    def __init__(self, engine: str) -> None:
        self.engine = engine

    def command(self, ranks: int, *arguments: str | Path) -> list[str]:
        """The command that starts a script on `ranks` ranks, as words."""
        launcher = {
            "horovod": ["mpirun", "-np", str(ranks), "--bind-to", "none", "--oversubscribe", sys.executable],
            "torch": [*TORCHRUN, "--standalone", "--nproc-per-node", str(ranks)],
        }[self.engine]  # fmt: skip
        return [*launcher, *map(str, arguments)]

    def __call__(
        self, ranks: int, *arguments: str | Path, timeout: float = 120, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script on `ranks` ranks and wait for its end. It may fail."""
        return run(*self.command(ranks, *arguments), timeout=timeout, **more)

    def code(self, returned: int, printed: str) -> int:
        """The job's exit code.

        torchrun always returns 1, but prints the code of the rank that failed first. After a signal it prints no code.
        """
        if "SignalException" in printed and "stopped on request" in printed:
            return 75
        found = re.search(r"Root Cause .*?exitcode +: (-?\d+)", printed, re.DOTALL)
        if self.engine != "torch" or returned != 1 or not found:
            return returned
        code = int(found[1])
        return code if code >= 0 else 128 - code

    def by_the_ranks(self, printed: str) -> str:
        """What the ranks printed, without the traceback and the report of torchrun."""
        return printed.split('Traceback (most recent call last):\n  File "<frozen runpy>"')[0]


TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def ranks_of(engine: str) -> Ranks:
    """Start ranks with `engine`. Skip the test if that is not possible here."""
    if engine == "horovod" and shutil.which("mpirun") is None:
        pytest.skip("no mpirun on the PATH: ./launch/setup.sh installs one")
    return Ranks(engine)


@pytest.fixture(scope="session")
def mpirun() -> Ranks:
    """``mpirun(n, script, *arguments)`` runs a Python script on n ranks of Horovod."""
    return ranks_of("horovod")


@pytest.fixture(scope="session", params=["horovod", "torch"])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """``ranks(n, script, *arguments)`` runs a Python script on n ranks. The test runs with each engine."""
    return ranks_of(request.param)


CLASSES, TRAIN, VAL = 3, 11, 5  # 33 images to train on, 15 to validate


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Small folders of real JPEG files: noise that is brighter for later classes."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for label in range(CLASSES):
            folder = root / split / f"n{label:08}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 100 + 70 * label, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.JPEG")
    return root


def flags(folders: Path, logs: Path, *more: str) -> list[str]:
    """Flags for epochs of 33 samples in steps of 16, 16 and 1. The last step is short."""
    return [
        "--train-dir", str(folders / "train"), "--val-dir", str(folders / "val"), "--log-dir", str(logs),
        "--run-name", "run", "--model", "shufflenet_v2_x0_5", "--image-size", "40", "--batch-size", "4",
        "--effective-batch-size", "16", "--base-op", "lars", "--base-lr", "0.1", "--warmup-epochs", "0.5",
        "--epochs", "3", "--no-cuda", "--workers", "0", "--log-every", "2", *more,
    ]  # fmt: skip


def long_flags(folders: Path, logs: Path, *more: str) -> list[str]:
    """Flags for 30 steps, which take a second or more, long enough for a signal to arrive during training."""
    return flags(folders, logs, "--epochs", "10", *more)


@pytest.fixture(scope="session")
def unbroken(folders, tmp_path_factory, mpirun):
    """The end of an undisturbed training with `long_flags`."""
    logs = tmp_path_factory.mktemp("unbroken")
    done = mpirun(2, "train_imagenet.py", *long_flags(folders, logs))
    assert done.returncode == 0, done.stderr
    return end_of(logs / "run")


def until(happened: Callable[[], object], seconds: float) -> None:
    """Wait until `happened` returns true. Fail if that takes too long."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.1)
