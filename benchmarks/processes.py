"""Start the processes of a benchmark, and wait for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.rounds import missing

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def mpirun(ranks: int) -> list[str]:
    """The words that start a script on several ranks of Horovod. Empty if there is no Horovod or no MPI."""
    bin_folder = Path(sys.executable).parent
    found = shutil.which("mpirun", path=f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    return (
        [str(ROOT / "launch/mpirun.sh"), "-np", str(ranks)]
        if found and not missing("horovod")
        else []
    )


def ranks_of(ranks: int) -> list[str]:
    """The words that start a script on several ranks of torch.distributed, or in one process."""
    return [*TORCHRUN, str(ranks)] if ranks > 1 else [sys.executable]


def finish(command: list[str]) -> str:
    """Run a command with one thread per process, and return its output.

    Raises:
        SystemExit: The command failed. The message holds the end of its errors.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        errors = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise SystemExit(f"{' '.join(command)} failed with exit code {done.returncode}:\n{errors}")
    return done.stdout
