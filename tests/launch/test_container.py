"""The container files: both build the same image, from files and options that exist."""

from __future__ import annotations

import re

from conftest import ROOT

FOLDER = ROOT / "launch/container"
DOCKER = (FOLDER / "Dockerfile").read_text().replace("\\\n", "")
APPTAINER = (FOLDER / "lars-imagenet.def").read_text().replace("\\\n", "")


def packages(text: str) -> list[str]:
    (found,) = re.findall(r"--no-install-recommends\s+(.+?)\s+&&", text)
    return found.split()


def test_both_images_have_the_same_packages_and_run_the_same_setup():
    assert packages(DOCKER) == packages(APPTAINER)
    assert {"g++", "make", "python3-dev", "python3-venv"} <= set(packages(DOCKER))
    setup = r"XDG_CACHE_HOME=(\S+) \./launch/setup\.sh \S*[{].+[}] && rm -rf (\S+) logs"
    assert re.search(setup, DOCKER).groups() == re.search(setup, APPTAINER).groups()
    (base,) = re.findall(r"^ARG BASE=(.+)$", DOCKER, re.MULTILINE)
    assert f"    BASE={base}\n" in APPTAINER


def test_the_image_contains_the_clone_without_what_it_builds():
    """The folder of the clone is copied. .dockerignore leaves out what git ignores."""
    left_out = set((FOLDER / "Dockerfile.dockerignore").read_text().split())
    ignored = (ROOT / ".gitignore").read_text().split()
    built = {line.strip("/") for line in ignored if line.startswith("/")}
    assert built
    assert built <= left_out
    assert not left_out & {path.name for path in ROOT.iterdir() if path.suffix == ".py"}
