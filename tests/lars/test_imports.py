"""Which part of the code may import which: a table, checked against the source with ast."""

from __future__ import annotations

import ast
import sys

import pytest

from conftest import ROOT

GROUND = {
    "lars.errors",
    "lars.importing",
    "lars.names",
    "lars.launcher",
    "lars.schedules",
    "lars.expected",
}
MIDDLE = {"lars.config", "lars.comm", "lars.optim", "lars.models"}

# What each part may import besides the standard library, torch and its own files. Imports point downwards only:
# engine -> benchmark -> observe -> run -> learner -> (optim, config, comm, models) -> (names, errors, launcher, ...).
ALLOWED = {
    "lars/__init__.py": {"lars"},
    "lars/errors.py": set(),
    "lars/importing.py": {"lars.errors"},
    "lars/names.py": set(),
    "lars/expected.py": set(),
    "lars/launcher.py": set(),
    "lars/schedules": set(),
    "lars/optim": {"lars.names"},
    "lars/models": {"torchvision", "lars.errors", "lars.importing"},
    "lars/config": {
        "lars.errors",
        "lars.importing",
        "lars.names",
        "lars.launcher",
        "lars.expected",
    },
    "lars/comm": {"horovod", "mpi4py", "lars.errors", "lars.names", "lars.launcher"},
    "lars/job": {"lars.comm", "lars.config", *GROUND},
    "lars/learner": {*MIDDLE, *GROUND, "lars.models", "lars.schedules", "safetensors"},
    "lars/run": {*MIDDLE, *GROUND, "lars.learner", "pyarrow", "safetensors"},
    "lars/observe": {
        *MIDDLE,
        *GROUND,
        "lars.learner",
        "lars.run",
        "numpy",
        "pyarrow",
        "tensorboard",
        "tqdm",
    },
    "lars/benchmark.py": {*MIDDLE, *GROUND, "lars.job", "lars.learner", "lars.observe"},
    "lars/evaluation.py": {
        *MIDDLE,
        *GROUND,
        "lars.job",
        "lars.learner",
        "lars.observe",
        "lars.run",
    },
    "lars/history.py": {"lars.errors", "lars.run.epochs", "lars.run.records"},
    "lars/figures.py": {"lars.errors", "lars.run.files", "matplotlib"},
    "lars/plot.py": {
        *("lars.config", "lars.errors", "lars.figures", "lars.run.records"),
        *("matplotlib", "numpy", "tensorboard"),
    },
    "lars/dry_run.py": {*MIDDLE, *GROUND, "lars.job", "lars.learner", "lars.observe", "lars.run"},
    "lars/report": {
        "jinja2",
        "lars.errors",
        "lars.expected",
        "lars.figures",
        "lars.history",
        "lars.observe.layer_file",
        "lars.plot",
        "lars.run",
        "markupsafe",
        "matplotlib",
        "numpy",
    },
    "lars/engine.py": {"lars"},
    "lars/command.py": {"lars.config.recipes", "lars.errors"},
    "lars/identify": {"lars.errors", "lars.importing", "lars.names", "lars.optim"},
    "data": {
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
    "launch/acceptance": {
        *("data.sources", "data.synthetic", "launch.doctor", "lars", "matplotlib"),
    },
    "train_imagenet.py": {
        "lars.config",
        "lars.engine",
        "lars.job.interrupt",
        "lars.launcher",
        "data",
    },
    "train_imagenet_dali.py": {
        "lars.config",
        "lars.engine",
        "lars.job.interrupt",
        "lars.launcher",
        "data",
    },
    "experiments/cells.py": {
        "data.sources.imagenet",
        "experiments",
        "lars.config",
        "lars.errors",
        "lars.run.files",
        "lars.run.records",
    },
    "experiments/sweep.py": {
        "experiments",
        "lars.errors",
        "lars.launcher",
        "lars.run.lock",
        "tqdm",
    },
    "experiments/tuning.py": {"experiments", "lars.schedules"},
    "experiments/report.py": {"experiments", "lars.figures", "lars.run.files", "numpy"},
    "experiments/published.py": {"experiments"},
    "experiments/large_batch_ladder.py": {"experiments"},
    "experiments/tvlars_grid.py": {"experiments"},
    "experiments/lars_forms.py": {"experiments"},
    "experiments/train_with_outlier.py": {
        "experiments",
        "lars.engine",
        "lars.job.interrupt",
        "lars.learner.learner",
    },
    "experiments/barlow_twins.py": {
        "experiments.train_small",
        "lars.config",
        "lars.engine",
        "lars.job.interrupt",
        "lars.launcher",
        "lars.run.identity",
    },
    "experiments/train_small.py": {
        "lars.config",
        "lars.engine",
        "lars.job.interrupt",
        "lars.launcher",
        "data",
    },
}

# Importing these modules must not import torch, so that --help and flag errors appear at once.
WITHOUT_TORCH = (
    *(
        "errors",
        "importing",
        "names",
        "expected",
        "launcher",
        "config",
        "job/__init__",
        "job/interrupt",
    ),
    *("command", "figures", "history", "plot", "report", "run/__init__", "run/files"),
    *("run/outcome", "run/records"),
)

# Packages that only these files may import.
ONLY_IN = {
    "horovod": {"lars/comm/horovod.py"},
    "mpi4py": {"lars/comm/horovod.py", "lars/comm/rendezvous.py", "data/tooling/pool.py"},
    "nvidia": {
        "data/loader/dali.py",
        "data/loader/dali_graph.py",
        "data/sources/imagenet.py",
        "data/pixels/decode.py",
    },
}


def imports(path) -> set[str]:
    """Full names of all imports in a file, including those inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: use absolute imports"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files_of(part: str):
    path = ROOT / part
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


ALL_FILES = [f for package in ("lars", "data") for f in files_of(package)]


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_what_the_table_allows(part):
    itself = part.removesuffix(".py").replace("/", ".")
    allowed = ALLOWED[part] | {"torch", itself}
    for path in files_of(part):
        for name in imports(path):
            if name.split(".")[0] in sys.stdlib_module_names:
                continue
            assert any(f"{name}.".startswith(f"{a}.") for a in allowed), f"{path} imports {name}"


def test_the_table_covers_every_file():
    covered = [f for part in ALLOWED for f in files_of(part)]
    for path in ALL_FILES:
        assert path in covered, f"{path} is missing from the table"


def test_few_files_import_horovod_mpi_and_dali():
    for path in ALL_FILES:
        for name in {name.split(".")[0] for name in imports(path)} & set(ONLY_IN):
            assert str(path.relative_to(ROOT)) in ONLY_IN[name], path


def test_few_files_mention_horovod():
    """The backend, the choice between backends, the wrapper for Horovod's optimizer, and tables with its name."""
    allowed = {"lars/__init__.py", "lars/comm/horovod.py", "lars/names.py", "lars/launcher.py"}
    allowed |= {"lars/comm/start.py", "lars/config/run_flags.py", "lars/models/sync_batch_norm.py"}
    for path in files_of("lars"):
        name = str(path.relative_to(ROOT))
        if name not in allowed and not name.startswith("lars/optim/"):
            assert "horovod" not in path.read_text().lower(), name


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_modules_behind_help_do_not_import_torch(module):
    for path in files_of(f"lars/{module}") or files_of(f"lars/{module}.py"):
        if path.exists():
            assert not any(name.split(".")[0] == "torch" for name in imports(path)), path


def functions(path):
    """(name, node, lines) of each function in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node, (node.end_lineno or 0) - node.lineno + 1


def test_functions_and_files_are_short():
    """A function has at most 60 lines, and a file at most 350."""
    for path in ALL_FILES:
        assert len(path.read_text().splitlines()) <= 350, path
        for name, _, lines in functions(path):
            assert lines <= 60, f"{path}: {name} has {lines} lines"


def test_the_engine_is_short_and_its_functions_take_few_parameters():
    engine = ROOT / "lars" / "engine.py"
    assert len(engine.read_text().splitlines()) <= 150
    for name, node, _ in functions(engine):
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        assert len(arguments) <= 6, name


def test_the_test_files_have_different_names():
    """Pytest imports them by their names alone, and refuses to collect two of the same name."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
