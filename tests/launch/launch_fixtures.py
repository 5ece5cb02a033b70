"""Fake programs, and clones of this project that consist of fake programs."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

from conftest import ROOT

OPEN_MPI_4 = "echo 'mpirun (Open MPI) 4.1.4'"
OPEN_MPI_5 = "echo 'mpirun (Open MPI) 5.0.11'"
MPICH = "printf 'HYDRA build details:\\n    Version: 4.3.2\\n'"


def program(path: Path, script: str) -> Path:
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + textwrap.dedent(script))
    path.chmod(0o755)
    return path


def only_path(folder: Path, *names: str) -> str:
    """A PATH that contains only the named programs of this machine and those in `folder`."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


def clone_of_scripts(folder: Path) -> Path:
    """The scripts in a clone whose path has a space, on a fake machine with 4 cores, without root."""
    root = folder / "a clone"
    (root / "launch").mkdir(parents=True)
    for script in (*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.py")):
        shutil.copy(script, root / "launch")
    tools = root / ".venv/bin"
    program(tools / "python", "exit 1\n")
    program(tools / "id", "echo 1000\n")
    program(tools / "nproc", "echo 8\n")
    cores = "".join(f"{core},0\\n{core},0\\n" for core in range(4))
    program(tools / "lscpu", f"printf '# Core,Socket\\n{cores}'\n")
    return root
