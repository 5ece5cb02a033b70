"""Compiles kernels.c once per machine or home directory, which takes one or two seconds.

The library is cached in ``~/.cache/lars-imagenet/kernels`` (or below ``$XDG_CACHE_HOME``) under the digest of its
source and flags, so it is never out of date. It contains code for several generations of CPUs, and the loader selects
the right one. Therefore hosts that share a home directory may have different CPUs. If the cache is not writable, each
process compiles the library again.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = (
    # These override flags in $CC: results must be the same everywhere, and old hosts must run what new hosts compile.
    "-fno-fast-math",  # first, because it resets some of the flags below
    *(["-march=x86-64"] if platform.machine() == "x86_64" else []),
    "-O3",
    "-std=gnu11",
    "-shared",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
SECONDS = 120
DIGEST_BYTES = 32


class CompilerError(Exception):
    """No compiler was found, or it failed; the message says what to do."""


def compiled(real: str) -> ctypes.CDLL:
    """Load the kernels for tensors of the C type ``real``, float or double; compile them if necessary.

    Raises:
        CompilerError: The kernels are not in the cache and cannot be compiled.
    """
    ingredients = [*FLAGS, sys.platform, platform.machine()]
    digest = hashlib.sha256("\n".join(ingredients).encode() + SOURCE.read_bytes()).hexdigest()
    cached = cache() / f"{real}-{digest[:16]}.so"
    with contextlib.suppress(OSError):
        if is_intact(cached):
            return ctypes.CDLL(str(cached))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        new = Path(folder, cached.name)
        arguments = [*FLAGS, f"-DREAL={real}", "-o", str(new), str(SOURCE)]
        try:
            run_compiler(["-fopenmp", *arguments])
            return loaded(new, cached)
        except CompilerError:
            run_compiler(arguments)  # without OpenMP, for one thread
            return loaded(new, cached)


def loaded(new: Path, cached: Path) -> ctypes.CDLL:
    """Copy a new library into the cache and load it from there, or else from where it is.

    A file system can be full, or mounted noexec.

    Raises:
        CompilerError: The library cannot be loaded from either place.
    """
    with contextlib.suppress(OSError):
        store(new, cached)
        return ctypes.CDLL(str(cached))
    try:
        return ctypes.CDLL(str(new))
    except OSError as error:
        raise CompilerError(f"the compiled library cannot be loaded: {error}") from None


def cache() -> Path:
    """The folder of the compiled libraries."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):  # the user has no name and no $HOME
        base = os.devnull
    return Path(base, "lars-imagenet", "kernels")


def run_compiler(arguments: list[str]) -> None:
    """Run ``$CC``, or the first of cc, gcc and clang on the PATH.

    Raises:
        CompilerError: No compiler was found, or it failed.
    """
    try:
        command = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise CompilerError(f"CC={os.environ['CC']} is not a command ({error})") from None
    if not command:
        found = [name for name in ("cc", "gcc", "clang") if shutil.which(name)]
        if not found:
            raise CompilerError("there is no C compiler (cc, gcc or clang): install one, or set CC")
        command = found[:1]
    try:
        done = subprocess.run(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(
            f"{command[0]} cannot be run ({error}): set CC to a C compiler"
        ) from None
    if done.returncode != 0:
        first_line = (done.stderr.strip() or "no message").splitlines()[0]
        raise CompilerError(f"{command[0]} failed ({first_line}): set CC to gcc or clang")


def is_intact(library: Path) -> bool:
    """Whether a cached library ends with the digest of its content.

    Loading a truncated library can kill the process.

    Raises:
        OSError: The library does not exist.
    """
    content = library.read_bytes()
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def store(library: Path, where: Path) -> None:
    """Copy a library into the cache and append its digest; several ranks may do so at the same time."""
    content = library.read_bytes()
    where.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=where.parent, prefix=".part-")
    try:
        with open(handle, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())
        os.replace(part, where)
    finally:
        Path(part).unlink(missing_ok=True)
