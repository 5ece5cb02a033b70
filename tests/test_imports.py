"""Who may import whom: the table of rooms, read from the source with ast."""

from __future__ import annotations

import ast
import sys

import pytest

from conftest import ROOT

# Beside the standard library and torch. A room's own package is written with a leading dot.
ALLOWED = {
    "lars/__init__.py": {"lars"},
    "lars/optim": {"lars.optim", "lars.schedules"},
    "lars/schedules.py": set(),
    "lars/metrics.py": set(),
    "lars/models": {"torchvision", "lars.config", "lars.models"},
    "lars/launched.py": set(),
    "lars/config.py": {"lars.launched"},
    "lars/checkpoint.py": set(),
    "lars/logs.py": {"tensorboard", "tqdm", "lars.checkpoint"},
    "lars/plan.py": {"lars.config"},
    "lars/comm.py": {"horovod", "mpi4py", "lars.config", "lars.gradients", "lars.launched"},
    "lars/gradients.py": set(),
    "lars/learner.py": {"lars.gradients", "lars.metrics"},
    "lars/interrupt.py": set(),
    "lars/watchdog.py": {"lars.comm"},
    "lars/benchmark.py": {"lars.learner", "lars.metrics", "lars.plan"},
    "lars/run.py": {"lars", "safetensors"},
    "lars/engine.py": {"lars"},
    "data": {
        "data",
        "torchvision",
        "numpy",
        "PIL",
        "simplejpeg",
        "sklearn",
        "tqdm",
        "google_crc32c",
        "mpi4py",
        "nvidia",
        "pyarrow",
        "scipy",
    },
    "train_imagenet.py": {"lars.config", "lars.engine", "lars.interrupt", "data"},
    "train_imagenet_dali.py": {"lars.config", "lars.engine", "lars.interrupt", "data"},
}


def imports(path) -> set[str]:
    """Full names of what a file imports, wherever it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files_of(room: str):
    path = ROOT / room
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_it_may(room):
    own = ALLOWED[room] | {"torch"}
    for path in files_of(room):
        for name in imports(path):
            if name.split(".")[0] in sys.stdlib_module_names:
                continue
            assert any(name == a or name.startswith(f"{a}.") for a in own), f"{path} imports {name}"


def test_every_file_of_the_packages_has_a_room():
    rooms = [f for room in ALLOWED for f in files_of(room)]
    for path in [*(ROOT / "lars").rglob("*.py"), *(ROOT / "data").rglob("*.py")]:
        assert path in rooms, f"{path} is in no room of the table"


def test_few_speak_to_horovod_mpi_and_dali():
    speakers = {
        "horovod": {"lars/comm.py"},
        "mpi4py": {"lars/comm.py", "data/parallel.py"},
        "nvidia": {"data/dali.py", "data/imagenet.py", "data/transforms.py"},
    }
    for path in [*(ROOT / "lars").rglob("*.py"), *(ROOT / "data").rglob("*.py")]:
        for name in {name.split(".")[0] for name in imports(path)} & set(speakers):
            assert str(path.relative_to(ROOT)) in speakers[name]
