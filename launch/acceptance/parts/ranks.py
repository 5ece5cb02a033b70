"""The ranks of the launcher: the doctor, allreduces with each backend, and a training step over all ranks.

Without a launcher, this part starts one rank on each GPU, or two ranks on the CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from lars import launcher
from lars.comm import start
from lars.names import BACKENDS
from launch.acceptance import on_ranks
from launch.acceptance.budget import Budget
from launch.acceptance.rows import Row, failed, not_tested

_ROOT = Path(__file__).parents[3]


def run(budget: Budget) -> Iterator[Row]:
    """Measure the ranks that there are, or start some."""
    tasks, name = launcher.tasks()
    if tasks == 1:
        yield from started(budget)
        return
    first = start.choose_backend()[0]
    for backend in sorted(BACKENDS, key=lambda each: each != first):
        module = importlib.import_module(BACKENDS[backend])
        if name in module.CANNOT_JOIN:
            yield not_tested(module.NAME, f"it cannot join ranks that {name} started")
        elif backend == "horovod" and not importlib.util.find_spec("horovod"):
            yield no_horovod()
        else:
            yield from on_ranks.rows(backend, with_doctor=backend == first)


def no_horovod() -> Row:
    """The row of a missing Horovod."""
    return not_tested("Horovod", "Horovod is not installed; ./launch/setup.sh --horovod")


def started(budget: Budget) -> Iterator[Row]:
    """Start ranks on this host with each backend."""
    size = max(2, torch.cuda.device_count())
    module = ["-m", "launch.acceptance.on_ranks"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    commands = {"torch": [sys.executable, *torchrun, *module]}
    if not importlib.util.find_spec("horovod"):
        yield no_horovod()
    elif not (Path(sys.executable).with_name("mpirun").exists() or shutil.which("mpirun")):
        yield not_tested("Horovod", "mpirun is not on the PATH; load the module of your MPI")
    else:
        commands["horovod"] = [f"{_ROOT}/launch/mpirun.sh", "-np", str(size), *module]
    for backend, command in commands.items():
        yield from rows_of(backend, command, budget)


def rows_of(backend: str, command: list[str], budget: Budget) -> Iterator[Row]:
    """Run a command of ranks, and read the rows that its root writes."""
    file = budget.folder / f"{backend}.json"
    done = subprocess.run([*command, backend, str(file)], cwd=_ROOT, env=os.environ, check=False)
    lines = file.read_text().splitlines() if file.exists() else []
    yield from (Row(**json.loads(line)) for line in lines)
    if done.returncode:
        yield failed(
            f"ranks with {backend}", f"{command[0]} ended with exit code {done.returncode}"
        )
