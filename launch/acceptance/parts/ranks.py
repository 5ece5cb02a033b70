"""The ranks of the launcher: the doctor, allreduces with each backend, and a training step over all ranks.

Without a launcher, this part starts one rank on each GPU, or two ranks on the CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lars import launcher
from lars.comm import start
from lars.names import BACKENDS
from launch.acceptance.budget import Budget
from launch.acceptance.rows import Row, failed, not_tested

_ROOT = Path(__file__).parents[3]
_MODULE = ("-m", "launch.acceptance.on_ranks")


def run(budget: Budget) -> Iterator[Row]:
    """Measure the ranks that there are, or start some."""
    tasks, name = launcher.tasks()
    if tasks == 1:
        yield from started(budget)
        return
    first = start.choose_backend()[0]
    backends = []
    for backend in sorted(BACKENDS, key=lambda each: each != first):
        module = importlib.import_module(BACKENDS[backend])
        if name in module.CANNOT_JOIN:
            yield not_tested(module.NAME, f"it cannot join ranks that {name} started")
        elif backend == "horovod" and not importlib.util.find_spec("horovod"):
            yield no_horovod()
        else:
            backends.append(backend)
    # One process for all backends, because the MPI of a task can start only once.
    yield from rows_of([sys.executable, *_MODULE, "--doctor"], backends, budget)


def no_horovod() -> Row:
    """The row of a missing Horovod."""
    return not_tested("Horovod", "Horovod is not installed; ./launch/setup.sh --horovod")


def started(budget: Budget) -> Iterator[Row]:
    """Start ranks on this host with each backend."""
    size = max(2, torch.cuda.device_count())
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}")
    yield from rows_of([sys.executable, *torchrun, *_MODULE], ["torch"], budget)
    if not importlib.util.find_spec("horovod"):
        yield no_horovod()
    elif not (Path(sys.executable).with_name("mpirun").exists() or shutil.which("mpirun")):
        yield not_tested("Horovod", "mpirun is not on the PATH; load the module of your MPI")
    else:
        mpirun = [f"{_ROOT}/launch/mpirun.sh", "-np", str(size)]
        yield from rows_of([*mpirun, *_MODULE], ["horovod"], budget)


def rows_of(command: Sequence[str], backends: Sequence[str], budget: Budget) -> Iterator[Row]:
    """Run a command on all ranks, and read the rows that its root writes."""
    file = budget.folder / "-".join(backends)
    done = subprocess.run([*command, str(file), *backends], cwd=_ROOT, check=False)
    lines = file.read_text().splitlines() if file.exists() else []
    yield from (Row(**json.loads(line)) for line in lines)
    if done.returncode:
        why = f"the ranks ended with exit code {done.returncode}; see the log of this part"
        yield failed(f"ranks with {' and '.join(backends)}", why)
