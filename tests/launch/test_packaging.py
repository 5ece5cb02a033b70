"""The wheel of the library: its metadata and its files, and the package once it is installed."""

from __future__ import annotations

import ast
import email
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import lars
from conftest import ROOT, environment, run
from lars import command
from launch.install import packages
from launch.install.environment import Clone

SCRIPTS = ("train_imagenet.py", "train_imagenet_dali.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built without a network from a copy, because a build leaves files in the folder of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("lars", "data", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", *SCRIPTS):
        shutil.copy(ROOT / name, source)
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder]
    built = run(sys.executable, "-m", "pip", "wheel", *options, source)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that contains the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--target", target]
    done = run(sys.executable, "-m", "pip", "install", *options, wheel)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_the_metadata_describe_the_project(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
        assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())
    assert metadata["Name"] == "lars-imagenet"
    assert metadata["Version"] == lars.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Apache-2.0" in (metadata["License"], metadata["License-Expression"])
    assert metadata["Description-Content-Type"] == "text/markdown"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata.get_payload(decode=True).decode().strip() == readme.strip()
    assert metadata["Project-URL"].startswith("Source, https://")
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert required == ["torch>=2.6"]


def files_in(folder: str) -> list[Path]:
    found = (ROOT / folder).rglob("*")
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]


def test_the_wheel_contains_the_whole_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {str(path.relative_to(ROOT)) for path in files_in("lars")}
    # What lars-train needs. A wheel with a top-level package named data would overwrite that of another distribution.
    for path in (*files_in("data"), *files_in("launch/recipes"), *map(ROOT.joinpath, SCRIPTS)):
        files.add(f"lars/_scripts/{path.relative_to(ROOT)}")
    assert packed == files
    assert {"lars/py.typed", "lars/expected.json"} <= packed
    assert any(name.endswith("/kernels.c") for name in packed)


def test_the_installed_library_works_outside_of_a_clone(installed, tmp_path):
    code = """
import json, sys
sys.path.insert(0, sys.argv[1])
import lars
assert "torch" not in sys.modules, "the version is known without torch"
print(json.dumps([lars.__file__, lars.__version__, dir(lars)]))
import torch
weights = [torch.nn.Parameter(torch.ones(3, 3))]
weights[0].grad = torch.ones(3, 3)
lars.LARS(weights, lr=0.1).step()
assert weights[0].isfinite().all() and weights[0].max() < 1
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    done = run(sys.executable, "-I", script, installed)
    assert done.returncode == 0, done.stderr
    file, version, names = json.loads(done.stdout.splitlines()[0])
    assert Path(file).is_relative_to(installed)
    assert version == lars.__version__
    assert names == sorted([*lars.__all__, "optim", "schedules", "__version__"])


def test_the_command_trains_outside_of_a_clone(installed, tmp_path):
    """lars-train finds its recipes, its data folder and, in the processes that decode, the same data folder."""
    for split, count in (("train", 8), ("val", 4)):
        for number in range(2 * count):
            folder = tmp_path / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            colour = (200 * (number % 2), number, 90)
            Image.new("RGB", (40, 40), colour).save(folder / f"{number}.jpg")
    # A package named data of another distribution has no effect.
    (tmp_path / "data").mkdir()
    (tmp_path / "data/__init__.py").write_text("raise RuntimeError('the data of another project')")
    script = [sys.executable, installed / "bin/lars-train", "--data", tmp_path]
    flags = "--recipe digits_lars_1024 --model small_cnn --image-size 32 --batch-size 8 --effective-batch-size 16"
    once = "--epochs 1 --warmup-epochs 0 --workers 1 --no-cuda --run-name r"
    paths = environment(PYTHONPATH=f"{installed}:{tmp_path}")
    words = [*script, *flags.split(), *once.split()]
    done = subprocess.run(
        words, cwd=tmp_path, env=paths, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "logs/imagenet/r/model.safetensors").exists()


def test_the_command_names_the_packages_that_are_missing(monkeypatch, capsys, tmp_path):
    (tmp_path / "broken-1.dist-info").mkdir()  # the rest of a package that pip could not remove
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        "importlib.metadata.requires",
        lambda _: ['nothing-x; extra == "train"', 'NumPy; extra == "train"', "torch"],
    )
    with pytest.raises(SystemExit, match="2"):
        command.train()
    message = capsys.readouterr().err
    assert "error: nothing-x: not installed; run pip install 'lars-imagenet[train]'" in message


MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "google-crc32c": "google_crc32c"}


def test_every_package_that_training_requires_is_imported(monkeypatch):
    monkeypatch.setattr(Clone, "python", sys.executable)
    required = set(packages.requirements(Clone(ROOT), ["train"])) - {"torch>=2.6"}
    imported = set()
    for folder in ("lars", "data", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add(node.module.split(".")[0])
    assert {MODULES.get(name, name) for name in required} <= imported
