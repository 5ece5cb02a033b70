"""The compiler of the CPU kernels: what it builds, where it caches it, and what happens if it fails."""

import ctypes
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from conftest import environment, run
from lars.optim.cpu import compiler, kernels


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lars-imagenet" / "kernels"


def test_the_library_is_compiled_once_and_cached(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.compiled("float")
    [kept] = empty_cache.iterdir()
    assert kept.name.startswith("float-")
    monkeypatch.setenv("CC", "false")
    assert isinstance(compiler.compiled("float"), ctypes.CDLL)


def test_other_sources_and_flags_make_another_library(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.compiled("float")
    other = tmp_path / "kernels.c"
    other.write_bytes(compiler.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(compiler, "SOURCE", other)
    compiler.compiled("float")
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-g"))
    compiler.compiled("float")
    assert len(list(empty_cache.iterdir())) == 3


def test_a_failed_cache_write_leaves_no_file_behind(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(compiler.os, "replace", no_space)
    assert isinstance(compiler.compiled("float"), ctypes.CDLL)
    assert list(empty_cache.iterdir()) == []


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here")
def test_openmp_is_used_if_the_compiler_supports_it(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "gcc")
    compiler.compiled("float")
    [kept] = empty_cache.iterdir()
    assert b"GOMP_parallel" in kept.read_bytes()


@pytest.mark.parametrize("command", ["gcc", "clang"])
def test_flags_in_cc_do_not_change_the_library(
    empty_cache: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All hosts and compilers share the cached library."""
    if shutil.which(command) is None:
        pytest.skip(f"no {command} here")
    contents = []
    for flags in ("", " -O0 -march=native", " -ffast-math"):
        monkeypatch.setenv("CC", command + flags)
        compiler.compiled("float")
        [kept] = empty_cache.iterdir()
        contents.append(kept.read_bytes())
        kept.unlink()
    assert contents[0] == contents[1] == contents[2]


def test_a_square_root_is_not_a_function_call(empty_cache: Path) -> None:
    """With -fmath-errno it would be one, and LAMB five times slower."""
    compiler.compiled("float")
    [kept] = empty_cache.iterdir()
    assert b"sqrt" not in kept.read_bytes()


@pytest.mark.parametrize("length", [0, 10, 1000, 20_000, -1])
def test_a_damaged_library_is_compiled_again(empty_cache: Path, length: int) -> None:
    """Loading some of these would end the process with a bus error."""
    compiler.compiled("float")
    [kept] = empty_cache.iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # this process has it mapped
    kept.write_bytes(whole[:length])
    compiler.compiled("float")
    assert kept.stat().st_size == len(whole)


def test_several_ranks_may_compile_at_once(empty_cache: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from lars.optim.cpu import kernels; assert kernels.available()",
    ]
    ranks = [subprocess.Popen(command, env=environment()) for _ in range(4)]
    assert [rank.wait(timeout=100) for rank in ranks] == [0] * 4
    kinds = sorted(path.name.partition("-")[0] for path in empty_cache.iterdir())
    assert kinds == ["double", "float"]


def test_a_file_where_the_cache_should_be_does_no_harm(empty_cache: Path) -> None:
    empty_cache.parent.write_text("")
    assert isinstance(compiler.compiled("float"), ctypes.CDLL)


@pytest.mark.parametrize("closed", ["the cache", "the folder of temporary files"])
def test_one_file_system_that_runs_programs_is_enough(
    empty_cache: Path, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ctypes.CDLL

    def load_if_open(name: str) -> ctypes.CDLL:
        if (empty_cache in Path(name).parents) == (closed == "the cache"):
            raise OSError("failed to map segment from shared object")
        return load(name)

    monkeypatch.setattr(ctypes, "CDLL", load_if_open)
    assert isinstance(compiler.compiled("float"), load)


def test_the_cache_is_never_in_a_relative_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "~")  # what expanduser returns for a user without a name and $HOME
    assert compiler.cache().is_absolute()
    monkeypatch.setenv("HOME", "/home/me")
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert compiler.cache() == Path("/home/me/.cache/lars-imagenet/kernels")


SCRIPT = """
import torch
from lars import LARS
weight = torch.nn.Parameter(torch.ones(3))
weight.grad = torch.ones(3)
for _ in range(2):
    LARS([weight], lr=0.1{more}).step()
print(weight.sum().item())
"""


@pytest.mark.parametrize(
    ("cc", "path", "message"),
    [
        ("", "/nowhere", "there is no C compiler (cc, gcc or clang): install one, or set CC"),
        ("false", None, "false failed (no message): set CC to gcc or clang"),
        ("/nowhere/cc -O2", None, "/nowhere/cc cannot be run"),
        ("gcc '", None, "CC=gcc ' is not a command (No closing quotation)"),
    ],
)
def test_without_a_compiler_the_loop_is_used_with_one_warning(
    empty_cache: Path, cc: str, path: str | None, message: str
) -> None:
    with_path = {} if path is None else {"PATH": path}
    done = run(sys.executable, "-c", SCRIPT.format(more=""), CC=cc, **with_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(3 * (1 - 2e-4), rel=1e-6)
    assert done.stderr.count(message) == 1
    assert "The plain loop is used instead" in done.stderr
    asked = run(sys.executable, "-c", SCRIPT.format(more=", path='fused'"), CC=cc, **with_path)
    assert asked.returncode == 1
    assert message in asked.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("does", "message"),
    [("exec sleep 100", "timed out"), (r"printf '\377 no' >&2; exit 1", "failed \\(\ufffd no\\)")],
)
def test_a_compiler_may_hang_or_print_another_encoding(
    does: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "cc"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    monkeypatch.setenv("CC", str(program))
    monkeypatch.setattr(compiler, "SECONDS", 0.5)
    with pytest.raises(compiler.CompilerError, match=message):
        compiler.run_compiler([])


def test_a_compiler_without_openmp_works(empty_cache: Path, tmp_path: Path) -> None:
    compiler_of_old = tmp_path / "cc"
    compiler_of_old.write_text(
        '#!/bin/sh\ncase "$*" in *-fopenmp*) echo no OpenMP >&2; exit 1;; esac\nexec gcc "$@"\n'
    )
    compiler_of_old.chmod(0o755)
    done = run(sys.executable, "-W", "error", "-c", SCRIPT.format(more=""), CC=str(compiler_of_old))
    assert done.returncode == 0, done.stderr


def test_neither_a_home_nor_a_utf8_locale_is_needed(empty_cache: Path) -> None:
    """A container may run as a user without a name, and kernels.c has non-ASCII characters."""
    homeless = f"""
import os
os.environ.pop("HOME"), os.environ.pop("XDG_CACHE_HOME")
os.path.expanduser = lambda path: path  # as it does for such a user
{SCRIPT.format(more="")}"""
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = run(sys.executable, "-X", "utf8=0", "-W", "error", "-c", homeless, **plain)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_warning_appears_if_the_kernels_work() -> None:
    kernels.available.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.available()
