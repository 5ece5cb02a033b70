"""Lists of images that are kept: they are used if nothing changed, and never if something did."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from conftest import ROOT
from data.samples import listing, listing_cache
from data.samples.tree import scan

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Class folders that are old enough to be trusted, and a cache of their own."""
    for name in CLASSES:
        (tmp_path / "images" / name / "inner").mkdir(parents=True)
        for image in ("1.jpg", "2.JPEG", "inner/3.png"):
            (tmp_path / "images" / name / image).write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing_cache, "_FEW", 1)
    monkeypatch.setattr(listing_cache, "_FRESH", 0.0)
    return tmp_path / "images"


@pytest.fixture
def listed(monkeypatch) -> list[str]:
    """The folders that were really listed."""
    names: list[str] = []

    def spy(path: str) -> listing.ClassFolder:
        names.append(os.path.basename(path))
        return listing.list_images(path)

    monkeypatch.setattr(listing_cache, "list_images", spy)
    return names


def names(root: Path) -> list[str]:
    tree = scan(str(root), "--train-dir")
    return [tree.name(i) for i in range(len(tree))]


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/lars-imagenet/listings").glob("*"))


def test_an_unchanged_tree_is_listed_once(root, tmp_path, listed):
    first = scan(str(root), "--train-dir")
    assert sorted(listed) == list(CLASSES)
    again = scan(str(root), "--train-dir")
    assert len(listed) == len(CLASSES)
    assert again.fingerprint == first.fingerprint
    assert [again.path(i) for i in range(9)] == [first.path(i) for i in range(9)]
    (file,) = cached(tmp_path)  # and no lock
    assert file.suffix == ".list"
    assert os.stat(file).st_mode & 0o077 == 0 or os.stat(file.parent).st_mode & 0o077 == 0


def add(root: Path) -> None:
    (root / "bee/4.jpg").write_bytes(b"")


def add_inside(root: Path) -> None:
    (root / "bee/inner/4.jpg").write_bytes(b"")


def remove(root: Path) -> None:
    (root / "bee/1.jpg").unlink()


def rename(root: Path) -> None:
    (root / "bee/1.jpg").rename(root / "bee/7.jpg")


def rename_and_restore_the_time(root: Path) -> None:
    """Like rsync -a or tar, which set the times of folders."""
    before = os.stat(root / "bee")
    rename(root)
    os.utime(root / "bee", ns=(before.st_atime_ns, before.st_mtime_ns))


def fill_a_file_of_unknown_kind(root: Path) -> None:
    (root / "bee/inner/picture").write_bytes(b"\xff\xd8\xff more")


def restore_the_target_of_a_link(root: Path) -> None:
    (root / "target").write_bytes(b"\xff\xd8\xff more")


def new_folder_under_the_old_name(root: Path) -> None:
    before = os.stat(root / "bee")
    shutil.copytree(root / "ant", root.parent / "new")
    (root.parent / "new/5.jpg").write_bytes(b"")
    shutil.rmtree(root / "bee")
    (root.parent / "new").rename(root / "bee")
    os.utime(root / "bee", ns=(before.st_atime_ns, before.st_mtime_ns))


def add_a_class(root: Path) -> None:
    shutil.copytree(root / "ant", root / "dog")


CHANGES = {
    add: ["bee"],
    add_inside: ["bee"],
    remove: ["bee"],
    rename: ["bee"],
    rename_and_restore_the_time: ["bee"],
    fill_a_file_of_unknown_kind: ["bee"],
    restore_the_target_of_a_link: ["cat"],
    new_folder_under_the_old_name: ["bee"],
    add_a_class: ["dog"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_and_only_its_folder_is_listed(change, root, listed, monkeypatch):
    (root / "bee/inner/picture").write_bytes(b"no image")
    os.symlink(root / "target", root / "cat/linked")
    with pytest.raises(Exception, match="linked"):  # the link has no target
        scan(str(root), "--train-dir")
    time.sleep(0.02)  # the clock of the file system advances
    change(root)
    listed.clear()
    (root / "target").touch()
    got = names(root)
    assert set(CHANGES[change]) <= set(listed) <= {*CHANGES[change], "cat"}
    monkeypatch.setattr(listing_cache, "_place", lambda root: None)
    assert got == names(root)


def test_a_folder_that_has_just_changed_is_listed_again(root, listed, monkeypatch):
    monkeypatch.setattr(listing_cache, "_FRESH", 10.0)
    names(root)
    listed.clear()
    names(root)
    assert sorted(listed) == list(CLASSES)
    # Another rank has saved its list after this one had asked: the ranks share it.
    listed.clear()
    monkeypatch.setattr(listing_cache, "time", Earlier())
    names(root)
    assert listed == []


class Earlier:
    """A clock on which this rank asked before the list was saved."""

    @staticmethod
    def time() -> float:
        return time.time() - 5


def with_crc(body: bytes) -> bytes:
    return b"%08x\n" % zlib.crc32(body) + body


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "text", "more", "fewer", "other"])
def test_a_damaged_file_counts_as_absent(root, tmp_path, listed, damage):
    expected = names(root)
    (file,) = cached(tmp_path)
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-3], "changed": content.replace(b"1.jpg", b"9.jpg"),
                      "empty": b"", "text": b"zz\nyes\n",
                      # written by a program with other fields
                      "more": with_crc(content[9:].replace(b'"other"', b'"new": 1, "other"')),
                      "fewer": with_crc(content[9:].replace(b'"other"', b'"others"')),
                      "other": with_crc(b"[1]\n")}[damage])  # fmt: skip
    listed.clear()
    assert names(root) == expected
    assert sorted(listed) == list(CLASSES)
    assert cached(tmp_path)[0].read_bytes()[9:20] == content[9:20]


def test_without_a_writable_folder_the_images_are_listed(root, tmp_path, listed, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(listing_cache.tempfile, "gettempdir", lambda: str(tmp_path / "cache"))
    expected = names(root)
    assert names(root) == expected
    assert len(listed) == 2 * len(CLASSES)
    monkeypatch.setattr(listing_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    names(root)
    names(root)  # from the folder of temporary files
    assert len(listed) == 3 * len(CLASSES)


def test_a_path_that_is_not_absolute_is_no_home(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(listing_cache.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without a home
    names(root)
    assert sorted(os.listdir(tmp_path)) == ["images", "temporary"]


@pytest.mark.parametrize("kind", ["fuse.sshfs", "squashfs", ""])
def test_file_systems_without_real_times_are_always_listed(
    kind, root, tmp_path, listed, monkeypatch
):
    monkeypatch.setattr(listing_cache, "_file_system", lambda real: kind)
    names(root)
    names(root)
    assert len(listed) == 2 * len(CLASSES)
    assert cached(tmp_path) == []


def test_the_file_system_of_a_path_is_known():
    assert listing_cache._file_system("/proc/self") == "proc"
    assert listing_cache._file_system("/dev/shm/x") in ("tmpfs", "devtmpfs", "overlay")


def test_small_trees_are_not_saved_and_old_lists_are_removed(root, tmp_path, monkeypatch):
    monkeypatch.setattr(listing_cache, "_KEPT", 2)
    for number in range(4):
        shutil.copytree(root, tmp_path / f"copy{number}")
        names(tmp_path / f"copy{number}")
    assert len(cached(tmp_path)) == 2
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(listing_cache, "_FEW", 10)
    names(root)
    assert cached(tmp_path) == []


CODE = """
import sys, time
from data.samples import class_folders, listing, listing_cache
listing_cache._FEW = 1
def spy(path):
    print("listed", flush=True)
    time.sleep(0.2)
    return listing.list_images(path)
listing_cache.list_images = spy
began = float(sys.argv[2])
time.time = lambda: began  # all ranks asked at the same moment
print(hash(tuple(f.packed for f in class_folders.list_folder(sys.argv[1]).folders)))
"""


def test_ranks_that_start_together_list_each_folder_once(root, tmp_path):
    command = [sys.executable, "-c", CODE, str(root), str(time.time())]
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    ranks = [
        subprocess.Popen(command, env=os.environ | {"PYTHONHASHSEED": "0"}, **options)
        for _ in range(3)
    ]
    output = "".join(rank.communicate()[0] for rank in ranks).split()
    assert output.count("listed") == len(CLASSES)
    assert len(output) == len(CLASSES) + len(ranks)
    assert len(set(output)) == 2  # the same images on all ranks
    assert [file.suffix for file in cached(tmp_path)] == [".list"]
