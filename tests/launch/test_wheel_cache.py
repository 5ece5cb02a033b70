"""The cache of wheels: files are verified, complete, and changed by one process at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from launch.install import files, wheel_cache


@pytest.fixture
def wheel(tmp_path):
    source = tmp_path / "made/one-1.0-py3-none-any.whl"
    source.parent.mkdir()
    source.write_bytes(b"wheel" * 1000)
    return source


@pytest.mark.parametrize(
    ("chosen", "folder"),
    [("/data/cache", "/data/cache"), ("cache", "/home/me/.cache"), ("", "/home/me/.cache")],
)
def test_the_folder_of_the_cache(monkeypatch, chosen, folder):
    """A relative path would be another folder for each working directory, so it does not count."""
    monkeypatch.setenv("HOME", "/home/me")
    found = wheel_cache.default_root({"XDG_CACHE_HOME": chosen})
    assert str(found) == f"{folder}/lars-imagenet"
    assert wheel_cache.default_root({}) == Path("/home/me/.cache/lars-imagenet")


def test_an_added_wheel_is_found_again(tmp_path, wheel):
    folder = tmp_path / "cache"
    kept = wheel_cache.add(folder, wheel)
    assert wheel_cache.verified(folder) == [kept]
    assert kept.read_bytes() == wheel.read_bytes()
    names = sorted(path.name for path in folder.iterdir())
    assert names == [wheel.name, f"{wheel.name}.sha256"]
    check = subprocess.run(["sha256sum", "--check", names[1]], cwd=folder, capture_output=True)
    assert check.returncode == 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "no sum", "empty sum", "junk sum"])
def test_a_damaged_file_is_deleted_and_reported(tmp_path, wheel, damage, capsys):
    folder = tmp_path / "cache"
    good = wheel_cache.add(folder, wheel)
    other = wheel_cache.add(folder, wheel.rename(wheel.with_name("two-1.0-py3-none-any.whl")))
    total = wheel_cache.sum_file(other)
    if damage == "flip":
        other.write_bytes(b"W" + other.read_bytes()[1:])
    elif damage == "truncate":
        other.write_bytes(other.read_bytes()[:-1])
    elif damage == "no sum":
        total.unlink()
    else:
        total.write_bytes(b"" if damage == "empty sum" else b"\xff\xfe")
    assert wheel_cache.verified(folder) == [good]
    assert not other.exists()
    assert not total.exists()
    assert str(other) in capsys.readouterr().out


def test_a_failed_copy_leaves_nothing_behind(tmp_path, wheel, monkeypatch):
    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        wheel_cache.add(tmp_path / "cache", wheel)
    assert list((tmp_path / "cache").iterdir()) == []


def test_leftovers_of_a_killed_setup_are_removed(tmp_path, wheel):
    kept = wheel_cache.add(tmp_path / "wheels", wheel)
    (tmp_path / "wheels/.unfinished-file").touch()
    (tmp_path / ".unfinished-folder/deep").mkdir(parents=True)
    with wheel_cache.locked(tmp_path):
        assert sorted(tmp_path.rglob(".unfinished*")) == []
    assert wheel_cache.verified(tmp_path / "wheels") == [kept]


def test_one_setup_waits_for_another(tmp_path):
    code = (
        "import sys, pathlib; from launch.install import wheel_cache\n"
        "with wheel_cache.locked(pathlib.Path(sys.argv[1]), waiting='waiting'):\n"
        "    print('held')"
    )
    with wheel_cache.locked(tmp_path):
        command = [sys.executable, "-c", code, str(tmp_path)]
        other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "waiting\n"
        assert other.poll() is None
    assert other.communicate(timeout=20)[0] == "held\n"
