"""The clone and its virtual environment, .venv."""

import dataclasses
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from launch.install import files
from launch.install.machine import SetupError

# Copied into .venv, and never imported here: the import would already change this interpreter.
TORCHVISION_FIX = Path(__file__).with_name("torchvision_on_cpu.py")

# Gigabytes of the environment and of the cache, measured with the CPU build of torch.
SPACE_VENV, SPACE_CACHE, SPACE_DALI = 2.0, 1.0, 1.5


@dataclasses.dataclass(frozen=True)
class Clone:
    """A clone of this project, and where setup puts things in it."""

    root: Path

    @property
    def venv(self) -> Path:
        """The virtual environment."""
        return self.root / ".venv"

    @property
    def python(self) -> str:
        """The interpreter of the virtual environment."""
        return str(self.venv / "bin/python")

    @property
    def logs(self) -> Path:
        """The folder for the logs of setup."""
        return self.root / "logs/setup"

    @property
    def constraints(self) -> Path:
        """The file with the version of every package."""
        return self.root / "launch/constraints.txt"

    @property
    def stamp(self) -> Path:
        """The file that says what the virtual environment contains."""
        return self.venv / "lars-imagenet.json"

    def ask(self, code: str, *arguments: str) -> str:
        """The last line that the environment's Python prints when it runs `code`."""
        command = [self.python, "-c", code, *arguments]
        result = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=True)
        return result.stdout.splitlines()[-1]

    def site_packages(self) -> Path:
        """The folder of the environment's packages."""
        return Path(self.ask("import sysconfig; print(sysconfig.get_paths()['purelib'])"))

    def version_of(self, package: str) -> str:
        """The version of a package in the environment."""
        return self.ask(f"import importlib.metadata as m; print(m.version({package!r}))")


def read_stamp(clone: Clone) -> dict:
    """What the last setup recorded; empty if there was none."""
    try:
        return json.loads(clone.stamp.read_text())
    except (OSError, ValueError):
        return {}


def write_stamp(clone: Clone, stamp: dict) -> None:
    """Record what the environment contains."""
    files.write_atomically(clone.stamp, io.BytesIO(json.dumps(stamp, indent=1).encode()))


def check_space(clone: Clone, cache: Path, dali: bool) -> None:
    """Check that the environment and the cache fit on the disk; what already exists needs no more space.

    Raises:
        SetupError: There is too little space.
    """
    cache.mkdir(parents=True, exist_ok=True)
    needs = {}
    if not clone.venv.exists():
        needs[clone.root] = SPACE_VENV + dali * SPACE_DALI
    if not (cache / "wheels").exists():
        needs[cache] = SPACE_CACHE + dali * SPACE_DALI / 2
    if len(needs) == 2 and os.stat(clone.root).st_dev == os.stat(cache).st_dev:
        needs = {clone.root: sum(needs.values())}
    for folder, gigabytes in needs.items():
        free = shutil.disk_usage(folder).free / 1e9
        if free < gigabytes:
            raise SetupError(
                f"{folder} has {free:.1f} GB free, but {gigabytes:.1f} GB are needed. Free some space, "
                "or move the clone; XDG_CACHE_HOME moves the cache."
            )


def make_venv(clone: Clone, stamp: dict) -> None:
    """Create .venv, or keep the existing one if it works and was made in this place.

    Raises:
        SetupError: There is a .venv that setup did not make and cannot use.
    """
    tag = sys.implementation.cache_tag
    try:
        same_python = clone.ask("import sys; print(sys.implementation.cache_tag)") == tag
    except (OSError, subprocess.CalledProcessError):
        same_python = False
    if same_python and stamp.get("prefix", str(clone.venv)) == str(clone.venv):
        return
    version = platform.python_version()
    if clone.venv.exists():
        if not stamp:
            raise SetupError(
                f"{clone.venv} was not made by setup and does not use Python {version}. "
                "Rename or remove it, or set PYTHON to its Python."
            )
        print(f"setup: {clone.venv} was made elsewhere or with another Python; replacing it")
        shutil.rmtree(clone.venv)
    print(f"setup: creating the virtual environment {clone.venv} (Python {version})", flush=True)
    venv.create(clone.venv, with_pip=True)


def imports_work(clone: Clone, horovod: bool) -> bool:
    """Whether the most important packages can be imported; the reason why not goes to a log."""
    code = "import tensorboard, torch, torchvision"
    if horovod:
        code += ", horovod.torch, mpi4py.MPI"
    command = [clone.python, "-c", code]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=clone.root, stdin=subprocess.DEVNULL
        )
    except OSError:
        return False
    (clone.logs / "imports.log").write_text(result.stdout + result.stderr)
    return result.returncode == 0


def fix_torchvision(clone: Clone) -> None:
    """Install torchvision_on_cpu.py into .venv if `import torchvision` needs it."""
    module = clone.site_packages() / TORCHVISION_FIX.name
    hook = module.with_suffix(".pth")
    for path in (hook, module):
        path.unlink(missing_ok=True)
    command = [clone.python, "-c", "import torchvision"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=clone.root)
    if "operator torchvision::nms does not exist" in result.stderr:
        shutil.copyfile(TORCHVISION_FIX, module)
        hook.write_text(f"import {module.stem}\n")


def compile_kernels(clone: Clone) -> None:
    """Compile the optimizers' CPU kernels now instead of in the first step, or print why it is impossible."""
    script = "from lars.optim.cpu import kernels; print(kernels.compile_error())"
    command = [clone.python, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, cwd=clone.root)
    if result.returncode == 0 and result.stdout.strip():
        print(f"setup: the optimizers will be slow on CPUs: {result.stdout.strip()}", flush=True)
