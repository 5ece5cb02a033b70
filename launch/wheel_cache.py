"""Wheels kept in the user's cache, so that the next clone installs quickly and without a network.

Every file lies beside its SHA-256. A file that does not match it, or has none, is deleted and made
again: it may come from a full disk, a killed process or another program.
"""

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

SUFFIXES = (".whl", ".tar.gz")
UNFINISHED = ".unfinished-"


def default_root(environ: dict[str, str]) -> Path:
    """``$XDG_CACHE_HOME/lars-imagenet``, by default ``~/.cache/lars-imagenet``."""
    base = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "lars-imagenet"


@contextlib.contextmanager
def locked(root: Path, waiting: str | None = None) -> Iterator[None]:
    """Hold the cache alone; what a killed process left unfinished is cleared away.

    Args:
        root: The cache folder; made if needed.
        waiting: What to print when another process has to be waited for.
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                print(waiting, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        for left in root.rglob(f"{UNFINISHED}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def unfinished(root: Path) -> tempfile.TemporaryDirectory:
    """A folder on the cache's disk for what is being made; used while the cache is held."""
    return tempfile.TemporaryDirectory(dir=root, prefix=UNFINISHED)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sum_file(path: Path) -> Path:
    """Where the SHA-256 of ``path`` is written, in the format of the ``sha256sum`` program."""
    return path.with_name(path.name + ".sha256")


def add(folder: Path, source: Path) -> Path:
    """Copy a wheel or sdist into ``folder``; it appears there whole or not at all.

    The sum is written last: a file without one is not trusted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.name
    digest = sha256(source)
    with open(source, "rb") as file:
        _write_atomically(target, file)
    _write_atomically(sum_file(target), io.BytesIO(f"{digest}  {source.name}\n".encode()))
    return target


def verified(folder: Path) -> list[Path]:
    """The files of ``folder`` that match their sums; all others are deleted and named."""
    good = []
    for path in sorted(folder.glob("*")):
        if not path.name.endswith(SUFFIXES):
            continue
        if _matches(path):
            good.append(path)
        else:
            print(f"cache: {path} is damaged or unverifiable; it is made again", flush=True)
            path.unlink()
            sum_file(path).unlink(missing_ok=True)
    return good


def _matches(path: Path) -> bool:
    try:
        words = sum_file(path).read_text().split()
    except (OSError, UnicodeDecodeError):
        return False
    return bool(words) and words[0] == sha256(path)


def _write_atomically(target: Path, content: BinaryIO) -> None:
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=UNFINISHED)
    try:
        with open(descriptor, "wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
