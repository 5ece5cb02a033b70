"""Indexes of large files: made once, kept beside the files or in another folder.

An index says where each image lies in a set of files. It is valid for files of the same names,
sizes and times of change. It is looked for, and written, in the folder that the user names
(``--index-dir``), or else beside the files, or else, if that folder cannot be written to, in
``$XDG_CACHE_HOME/lars-imagenet/indexes`` (``~/.cache/lars-imagenet/indexes``).
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from data import SetError
from data.samples.listing_cache import cache_folder, one_at_a_time
from data.tooling.atomic import replacing, sweep_beside

Tables = dict[str, NDArray[np.generic]]

# Changes whenever the contents of an index change.
_VERSION = 2


def index_of(
    paths: Sequence[str],
    folder: str,
    name: str,
    make: Callable[[], Tables],
    index_dir: str | None = None,
) -> Tables:
    """Return the index of some files; make and store it first if there is none that is valid.

    Processes that need the same index at the same time wait for the one that makes it.

    Args:
        paths: The files.
        folder: Folder that contains them.
        name: What the files are, for the name of the index: ``train-tar``.
        make: Makes the index.
        index_dir: Folder for the index; None: beside the files, or the cache.

    Raises:
        SetError: The index cannot be stored, or `make` raised it.
    """
    identity = _identity(paths)
    places = _places(folder, name, index_dir)
    for place in places:
        tables = _load(place, identity)
        if tables is not None:
            return tables
    for place in places:
        if not _can_write(os.path.dirname(place)):
            continue
        with one_at_a_time(place):
            tables = _load(place, identity)  # made by another process while this one waited
            if tables is None:
                print(f"making an index of {len(paths):,} files, once: {place}", file=sys.stderr)
                tables = make()
                _store(place, identity, tables)
            return tables
    raise SetError(
        f"the index of {folder} cannot be written to {os.path.dirname(places[-1])}; name a folder "
        "for it with --index-dir"
    )


def _places(folder: str, name: str, index_dir: str | None) -> list[str]:
    """Return the paths where the index may be, the preferred one first."""
    file = f"index-{name}.npz"
    # One folder can hold the indexes of many sets.
    of_set = f"{hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:16]}-{file}"
    if index_dir is not None:
        return [os.path.join(index_dir, of_set)]
    cache = cache_folder("indexes")
    places = [os.path.join(folder, file)]
    return [*places, os.path.join(cache, of_set)] if cache else places


def _can_write(folder: str) -> bool:
    with suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    return os.access(folder, os.W_OK | os.X_OK)


def _identity(paths: Sequence[str]) -> Tables:
    """Return what must be equal for an index to be valid."""
    status = [os.stat(path) for path in paths]
    return {
        "version": np.array(_VERSION),
        "file_names": np.array([os.path.basename(path) for path in paths]),
        "file_sizes": np.array([each.st_size for each in status]),
        "file_times": np.array([each.st_mtime_ns for each in status]),
    }


def _load(place: str, identity: Tables) -> Tables | None:
    """Return a stored index; None if there is none, or none of these files, or it is damaged."""
    try:
        with np.load(place, allow_pickle=False) as stored:
            if not all(np.array_equal(stored[key], value) for key, value in identity.items()):
                return None
            return {str(key): stored[key] for key in stored["tables"]}
    except Exception:  # damage can raise anything
        return None


def _store(place: str, identity: Tables, tables: Tables) -> None:
    with suppress(OSError):
        sweep_beside(place)
    try:
        with replacing(place) as file:
            names = np.array(sorted(tables))  # damage can hide a table
            np.savez(file, **identity, **tables, tables=names)  # type: ignore[arg-type]
    except OSError as error:
        raise SetError(
            f"the index {place} cannot be written ({error.strerror}); name another folder with "
            "--index-dir"
        ) from error
