"""Limits of the machine are named with their fix: open files and shared memory."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import resource
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, environment
from data import DataError, SetError
from data.check.__main__ import main as check
from data.samples.tree import scan
from data.sources.noise import Synthetic
from data.tooling import limits
from data_fixtures import Share, write_tree


@pytest.fixture
def set_limit(monkeypatch):
    """Pretend that the limits of open files are (soft, hard); return the list of changes."""
    changes = []

    def pretend(soft, hard):
        monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
        monkeypatch.setattr(resource, "setrlimit", lambda _, values: changes.append(values))
        return changes

    return pretend


def test_the_soft_limit_of_open_files_is_raised_as_far_as_needed(set_limit):
    assert set_limit(1024, 4096) == []
    limits.allow_open_files(8, 16)
    limits.allow_open_files(60, 16)
    assert set_limit(1024, 4096) == []
    limits.allow_open_files(100, 16)
    assert set_limit(100, resource.RLIM_INFINITY) == [(1664, 4096)]
    limits.allow_open_files(100, 16)
    assert set_limit(resource.RLIM_INFINITY, resource.RLIM_INFINITY)[1:] == [
        (1664, resource.RLIM_INFINITY)
    ]


def test_a_hard_limit_of_open_files_is_named_before_training(set_limit):
    set_limit(48, 48)
    source = Synthetic(image_size=8, num_classes=3, train_size=4, val_size=4)
    source.start_workers(0)
    with pytest.raises(SetError, match=r"--workers 2 needs 96 open files, .*48; .*ulimit -n 96"):
        source.start_workers(2)


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_too_many_open_files_are_no_bad_images(tmp_path, policy):
    """Under a policy that leaves images out, the run would go on with almost none."""
    write_tree(tmp_path / "train", {"ant": 3, "bee": 3})
    program = f"""
import os, resource, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from data.sources.imagenet import ImageNet
from data_fixtures import Share
source = ImageNet({str(tmp_path / "train")!r}, {str(tmp_path / "train")!r}, image_size=16, on_bad_image={policy!r})
loader = source.train_loader(Share(), 0)
list(loader.epoch(0))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
try:
    list(loader.epoch(0))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("SetError too many files are open (the limit is 64)"), done.stderr
    assert "ulimit -n" in done.stdout


def test_errors_of_torch_at_a_limit_are_named(monkeypatch):
    source = Synthetic(image_size=8, num_classes=3, train_size=4, val_size=4)
    for error, expected in (
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (
            RuntimeError("unable to open shared memory object: Too many open files (24)"),
            "ulimit -n",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "--shm-size"),
        (
            RuntimeError("unable to write to file </torch_1>: No space left on device (28)"),
            "--shm-size",
        ),
    ):
        loader = source.train_loader(Share(), workers=0)

        def broken(error=error):
            raise error

        monkeypatch.setattr(type(loader._loader), "__iter__", lambda _, broken=broken: broken())
        with pytest.raises(DataError, match=expected):
            list(loader.epoch(0))


def test_other_errors_of_torch_stay_as_they_are(monkeypatch):
    source = Synthetic(image_size=8, num_classes=3, train_size=4, val_size=4)
    loader = source.train_loader(Share(), workers=0)

    def broken(_):
        raise RuntimeError("something else")

    monkeypatch.setattr(type(loader._loader), "__iter__", broken)
    with pytest.raises(RuntimeError, match="something else"):
        list(loader.epoch(0))


def test_tables_that_do_not_fit_into_shared_memory_are_named(tmp_path, monkeypatch):
    import torch

    def full(_):
        raise RuntimeError("unable to resize file </torch_1>: No space left on device (28)")

    write_tree(tmp_path / "train", {"ant": 1, "bee": 1})
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(
        SetError, match=r"a table of the samples needs .* kB of /dev/shm, .*--shm-size"
    ):
        scan(str(tmp_path / "train"), "--train-dir")


@pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("unshare") is None, reason="needs to mount a file system"
)
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_tiny_shared_memory_is_named(tmp_path, workers):
    write_tree(tmp_path / "train", {"ant": 3, "bee": 3})
    flags = f"--train-dir {tmp_path}/train --val-dir {tmp_path}/train --workers {workers} --no-cuda"
    command = (
        f"mount -t tmpfs -o size=8k tmpfs /dev/shm && {sys.executable} train_imagenet.py {flags}"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], cwd=ROOT, env=environment(), capture_output=True,
        text=True, check=False, timeout=120,
    )  # fmt: skip
    if "permission denied" in done.stderr.lower() or "not permitted" in done.stderr.lower():
        pytest.skip("file systems cannot be mounted here")
    assert done.returncode == 3, done.stderr
    assert "/dev/shm" in done.stderr
    assert "--shm-size" in done.stderr
    assert "Traceback" not in done.stderr


def test_few_record_files_are_open_where_the_limit_is_low(set_limit):
    set_limit(48, 48)
    assert limits.open_file_limit() == 48


def test_the_tools_name_the_limit_too(set_limit, monkeypatch, tmp_path, capsys):
    root = str(write_tree(tmp_path / "train", {"ant": 1, "bee": 1}))
    folders = ["--train-dir", root, "--val-dir", root, "--workers", "2"]
    set_limit(48, 48)
    assert check(folders) == 3
    assert "--workers 2 needs 72 open files, but the limit is 48" in capsys.readouterr().err
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", full)
    assert check(folders) == 3
    assert "--shm-size" in capsys.readouterr().err
