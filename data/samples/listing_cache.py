"""Lists of images that are kept between starts and shared by the ranks of a host.

Listing 1.28 million files takes seconds of CPU time on each rank, and thousands of requests to a file
server. The first rank therefore lists and saves, while the other ranks wait. Later starts only
compare the stamps of the class folders.

A saved list of a class folder counts only if nothing that decided about it has changed: the folder,
each folder inside it, and each file whose name does not show what it is. Their inode, their two times
of change and their size must be the same. Adding, removing or renaming a file changes the times of
its folder. The content and the size of images do not matter to a list.

The times say nothing if a change follows so soon that the clock of the file system has not advanced.
So a folder that was changed less than `_FRESH` seconds before it was listed is listed again, unless
another rank listed it after this one had asked. They also say nothing on file systems that invent
times or take them from an archive (FUSE, squashfs). Nothing is saved for a file system that is not in
`_RELIABLE`. In all these cases the images are listed, as they are without a cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data.samples.listing import ClassFolder, list_images, stamp
from data.tooling.atomic import replacing, sweep_beside

# Part of the name of each file, so that a change of the rules in `data.samples.listing` or of the
# format makes old files useless.
_VERSION = 1

# File systems whose folders have real times of change.
_RELIABLE = {
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"),
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph"),
}

# Longer than the time that clocks of file systems need to advance (up to 2 s), and than the usual
# difference between the clocks of a client and its file server.
_FRESH = 10.0

# Listing fewer images is fast.
_FEW = 10_000

# Saved lists to keep; the oldest are removed.
_KEPT = 16

# Listing a folder on a network file system is mostly waiting for replies, which threads overlap.
_SCAN_THREADS = 16


def list_folders(root: str, names: Sequence[str]) -> list[ClassFolder]:
    """List the images in folders directly under `root`, or take their saved lists.

    Args:
        root: The folder that holds them.
        names: The folders' names.

    Raises:
        OSError: A folder cannot be listed.
    """
    began = time.time()
    path = _place(root)
    if path is None:
        return _listed(root, names, {})
    found = _still_valid(root, names, _load(path, began))
    if len(found) == len(names):
        return [found[name] for name in names]
    with one_at_a_time(path):
        # Another rank may have saved the lists since.
        found = _still_valid(root, names, _load(path, began))
        folders = _listed(root, names, found)
        if len(found) < len(names) and sum(folder.packed.count(0) for folder in folders) >= _FEW:
            _save(path, _on_same_device(root, dict(zip(names, folders, strict=True))))
    return folders


def _listed(root: str, names: Sequence[str], known: dict[str, ClassFolder]) -> list[ClassFolder]:
    """List the folders that are not in `known`."""
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        return list(
            pool.map(lambda name: known.get(name) or list_images(os.path.join(root, name)), names)
        )


def _still_valid(
    root: str, names: Sequence[str], saved: dict[str, ClassFolder]
) -> dict[str, ClassFolder]:
    """Return the saved lists of which nothing has changed."""

    def is_valid(name: str) -> bool:
        place = os.path.join(root, name)
        return all(stamp(os.path.join(place, path)) == was for path, was in saved[name].stamps)

    candidates = [name for name in names if name in saved]
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        valid = list(pool.map(is_valid, candidates))
    return {name: saved[name] for name, good in zip(candidates, valid, strict=True) if good}


def _is_fresh(folder: ClassFolder) -> bool:
    """Whether something changed so shortly before it was listed that the times may hide a change."""
    newest = max((max(was[1:3]) for _, was in folder.stamps if was is not None), default=0)
    return newest / 1e9 > folder.listed - _FRESH


def _place(root: str) -> str | None:
    """Return the path of the saved lists; None if they cannot be trusted or saved."""
    real = os.path.realpath(root)
    try:
        inode = os.stat(root).st_ino
        if _file_system(real) not in _RELIABLE:
            return None
    except OSError:
        return None
    identity = repr((_VERSION, real, inode))
    name = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:32]
    folder = cache_folder("listings")
    return folder and os.path.join(folder, f"{name}.list")


def _file_system(real: str) -> str:
    """Return the type of the file system that a path without links lies on."""
    kind, longest = "", 0
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            words = line.split()
            point = words[4].replace("\\040", " ")
            if len(point) >= longest and os.path.commonpath([point, real]) == point:
                kind, longest = words[words.index("-") + 1], len(point)
    return kind


def cache_folder(name: str) -> str | None:
    """Return a folder of this user that can be written to: ``~/.cache/lars-imagenet/<name>``.

    If the home folder cannot be written to, it is a folder for temporary files. None if there is
    none either.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # the standard ignores such a path
        home = os.path.expanduser("~/.cache")
    usual = os.path.join(home, "lars-imagenet", name)
    if os.path.isabs(home) and _is_usable(usual):  # a user can have no home folder
        return usual
    fallback = os.path.join(tempfile.gettempdir(), f"lars-imagenet-{os.getuid()}")
    return fallback if _is_usable(fallback) else None


def _is_usable(folder: str) -> bool:
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        mine = os.stat(folder).st_uid == os.getuid()
    except OSError:
        return False
    return mine and os.access(folder, os.W_OK | os.X_OK)


@contextlib.contextmanager
def one_at_a_time(path: str) -> Iterator[None]:
    """Wait until no other process holds this lock; go on without it if the file system has none."""
    lock = f"{path}.lock"
    descriptor = None
    with contextlib.suppress(OSError):
        while descriptor is None:
            opened = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX)
                if os.stat(lock).st_ino == os.fstat(opened).st_ino:
                    descriptor = opened
            except FileNotFoundError:  # its holder has removed it, so somebody may hold a new one
                pass
            finally:
                if descriptor is None:
                    os.close(opened)
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.unlink(lock)
            os.close(descriptor)


def _on_same_device(root: str, folders: dict[str, ClassFolder]) -> dict[str, ClassFolder]:
    """Return the folders that lie with all their content on the file system of `root`."""
    device = os.stat(root).st_dev

    def is_on_it(name: str) -> bool:
        paths = (path for path, was in folders[name].stamps if was is not None)
        try:
            return all(os.stat(os.path.join(root, name, p)).st_dev == device for p in paths)
        except OSError:
            return False

    return {name: folder for name, folder in folders.items() if is_on_it(name)}


def _save(path: str, folders: dict[str, ClassFolder]) -> None:
    """Save lists; do nothing if that is impossible."""
    rows = {name: vars(folder) | {"packed": len(folder.packed)} for name, folder in folders.items()}
    head = json.dumps({"saved": time.time(), "folders": rows}).encode()
    body = b"".join((head, b"\n", *(folder.packed for folder in folders.values())))
    with contextlib.suppress(OSError):
        sweep_beside(path)
        with replacing(path) as file:
            file.write(b"%08x\n" % zlib.crc32(body))
            file.write(body)
        _remove_oldest(os.path.dirname(path))


def _remove_oldest(folder: str) -> None:
    paths = [entry.path for entry in os.scandir(folder) if entry.name.endswith(".list")]
    for path in sorted(paths, key=os.path.getmtime)[:-_KEPT]:
        os.unlink(path)


def _load(path: str, began: float) -> dict[str, ClassFolder]:
    """Return the saved lists; none if the file is missing, damaged, or of another program.

    Args:
        path: The file.
        began: When this process asked. Lists of folders that were fresh count if they were saved
            later, because then another rank of this job has just made them.
    """
    try:
        with open(path, "rb") as file:
            crc, body = file.readline(), file.read()
        if int(crc, 16) != zlib.crc32(body):
            return {}
        saved, folders = _parsed(body)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    if saved < began:
        folders = {name: folder for name, folder in folders.items() if not _is_fresh(folder)}
    return folders


def _parsed(body: bytes) -> tuple[float, dict[str, ClassFolder]]:
    """Return when lists were saved, and the lists."""
    end = body.index(b"\n") + 1
    head = json.loads(body[:end])
    folders = {}
    for name, row in head["folders"].items():
        packed = body[end : end + row["packed"]]
        end += row["packed"]
        folders[name] = ClassFolder(**row | {"packed": packed, **_restored(row)})
    return float(head["saved"]), folders


def _restored(row: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a row to which JSON gives another type."""
    return {
        "other": Counter(row["other"]),
        "recognised": Counter(row["recognised"]),
        "stamps": [(path, was and tuple(was)) for path, was in row["stamps"]],
    }
