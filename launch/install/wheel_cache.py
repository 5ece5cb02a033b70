"""The user's cache of wheels, so that the next clone installs quickly and without a network.

Next to every file lies its SHA-256. A file without a matching sum is deleted and fetched or built again: the cause may
be a full disk, a killed process or another program.
"""

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launch.install import files

SUFFIXES = (".whl", ".tar.gz")


def default_root(environ: dict[str, str]) -> Path:
    """``$XDG_CACHE_HOME/lars-imagenet``, by default ``~/.cache/lars-imagenet``. A relative path does not count."""
    base = environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "lars-imagenet")


@contextlib.contextmanager
def locked(root: Path, waiting: str | None = None) -> Iterator[None]:
    """Hold the cache exclusively, and remove what a killed process left unfinished.

    Args:
        root: The cache folder, created if needed.
        waiting: What to print if another process holds the cache.
    """
    with files.locked(root / "lock", waiting):
        for leftover in root.rglob(f"{files.UNFINISHED}*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield


def temporary_folder(root: Path) -> tempfile.TemporaryDirectory:
    """A folder on the cache's disk for downloads and builds; use it while the cache is locked."""
    return tempfile.TemporaryDirectory(dir=root, prefix=files.UNFINISHED)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sum_file(path: Path) -> Path:
    """The file that holds the SHA-256 of `path`, in the format of the ``sha256sum`` program."""
    return path.with_name(path.name + ".sha256")


def add(folder: Path, source: Path) -> Path:
    """Copy a wheel or sdist into `folder`, where it appears complete or not at all.

    The sum is written last, because a file without a sum is not trusted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.name
    digest = sha256(source)
    with open(source, "rb") as file:
        files.write_atomically(target, file)
    files.write_atomically(sum_file(target), io.BytesIO(f"{digest}  {source.name}\n".encode()))
    return target


def verified(folder: Path) -> list[Path]:
    """The wheels and sdists in `folder` that match their sums; all others are deleted and reported."""
    good = []
    for path in sorted(folder.glob("*")):
        if not path.name.endswith(SUFFIXES):
            continue
        if _matches_its_sum(path):
            good.append(path)
        else:
            print(f"setup: deleted {path} from the cache: its checksum does not match", flush=True)
            path.unlink()
            sum_file(path).unlink(missing_ok=True)
    return good


def _matches_its_sum(path: Path) -> bool:
    try:
        words = sum_file(path).read_text().split()
    except (OSError, UnicodeDecodeError):
        return False
    return bool(words) and words[0] == sha256(path)
