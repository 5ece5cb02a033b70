"""Compiles kernels.c where no program has done so yet: one or two seconds, once per machine or home.

The library is kept in ``~/.cache/lars-imagenet/kernels`` (``$XDG_CACHE_HOME`` moves it) under the digest of its source
and flags, so it is never out of date. It contains the code for several generations of CPUs and takes what it needs when
it is loaded: hosts that share a home may differ. Without a cache that can be written it is compiled for each process.
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
    # Whatever $CC holds: the results are to be the same everywhere, and old hosts to run what new ones compile.
    "-fno-fast-math",  # the first, for it takes back those below
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
    """There is no compiler, or it fails; the message says what to do."""


def compiled(real: str) -> ctypes.CDLL:
    """The kernels with ``real``, float or double, as the type of their tensors.

    Raises:
        CompilerError: They are not in the cache and cannot be compiled.
    """
    ingredients = [*FLAGS, sys.platform, platform.machine()]
    digest = hashlib.sha256("\n".join(ingredients).encode() + SOURCE.read_bytes()).hexdigest()
    kept = cache() / f"{real}-{digest[:16]}.so"
    with contextlib.suppress(OSError):
        if is_whole(kept):
            return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        new = Path(folder, kept.name)
        arguments = [*FLAGS, f"-DREAL={real}", "-o", str(new), str(SOURCE)]
        try:
            run_compiler(["-fopenmp", *arguments])
            return loaded(new, kept)
        except CompilerError:
            run_compiler(arguments)  # for one thread
            return loaded(new, kept)


def loaded(new: Path, kept: Path) -> ctypes.CDLL:
    """Keep a new library and load it, from either place: a file system may be full, or closed to programs.

    Raises:
        CompilerError: It can be loaded from neither.
    """
    with contextlib.suppress(OSError):
        keep(new, kept)
        return ctypes.CDLL(str(kept))
    try:
        return ctypes.CDLL(str(new))
    except OSError as error:
        raise CompilerError(f"the compiled library cannot be loaded: {error}") from None


def cache() -> Path:
    """The folder of the compiled libraries."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):  # a user without a name and $HOME
        base = os.devnull
    return Path(base, "lars-imagenet", "kernels")


def run_compiler(arguments: list[str]) -> None:
    """Run ``$CC``, or the first of cc, gcc and clang on the PATH.

    Raises:
        CompilerError: There is none, or it fails.
    """
    try:
        command = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise CompilerError(f"CC={os.environ['CC']} is no command ({error})") from None
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
        said = (done.stderr.strip() or "it says nothing").splitlines()[0]
        raise CompilerError(f"{command[0]} fails ({said}): set CC to gcc or clang")


def is_whole(library: Path) -> bool:
    """Whether a kept library ends in the digest of what precedes it; to load half of one kills the process.

    Raises:
        OSError: It is not there.
    """
    content = library.read_bytes()
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def keep(library: Path, where: Path) -> None:
    """Copy into the cache, with its digest at the end, however many ranks do so at once."""
    content = library.read_bytes()
    where.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=where.parent, prefix=".part-")
    try:
        with open(handle, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())
        os.replace(part, where)
    finally:
        Path(part).unlink(missing_ok=True)
