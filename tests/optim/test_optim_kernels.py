"""The compiled kernels: compiled once, the same bits on every CPU, and known to autograd."""

import ctypes
import math
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conftest import environment, run
from lars import LAMB, LARS, TVLARS
from lars.optim.cpu import compiler, kernels

Build = Callable[..., Optimizer]
PART = 16384  # of kernels.c: larger tensors are cut into parts that the threads share
SIZES = (1, 15, 33, PART - 1, PART, PART + 1, 5 * PART + 17, 64 * PART + 3)
RULES: dict[str, Build] = {
    "lars": lambda params, **options: LARS(
        params, lr=0.1, momentum=0.9, weight_decay=0.1, **options
    ),
    "lars-nesterov": lambda params, **options: LARS(
        params, lr=0.1, momentum=0.9, nesterov=True, form="mlperf", **options
    ),
    "lars-joint": lambda params, **options: LARS(
        params, lr=0.1, weight_decay=0.1, form="optax", **options
    ),
    "tvlars": lambda params, **options: TVLARS(params, lr=0.1, **options),
    "lamb": lambda params, **options: LAMB(params, lr=0.1, weight_decay=0.1, **options),
    "lamb-paper": lambda params, **options: LAMB(params, lr=0.1, form="paper", **options),
    "lamb-coupled": lambda params, **options: LAMB(
        params, lr=0.1, eps=1e-3, weight_decay=0.1, decoupled_weight_decay=False, **options
    ),
}
every_rule = pytest.mark.parametrize("build", RULES.values(), ids=RULES.keys())


def stepped(build: Build, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Tensors of all sizes after three steps, every other one after two."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(n, generator=generator, dtype=dtype)) for n in SIZES]
    optimizer = build(params, **options)
    for stepping in (params[::2], params, params):
        for p in stepping:
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
        optimizer.step()
    return [p.detach() for p in params]


# -------------------------------------------------------------------------------------- the result


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_of_all_sizes_are_stepped_as_by_the_loop(build: Build, dtype: torch.dtype) -> None:
    fused, loop = (stepped(build, dtype, path=path) for path in ("fused", "loop"))
    digits = {torch.float32: 1e-4, torch.float64: 1e-11}[dtype]
    for size, ours, reference in zip(SIZES, fused, loop, strict=True):
        torch.testing.assert_close(
            ours, reference, rtol=digits, atol=digits, msg=f"{size} elements"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_of_squares_is_that_of_all_elements(dtype: torch.dtype) -> None:
    tensors = [torch.linspace(1, 2, n, dtype=dtype) for n in SIZES]
    sums = [tensor.double().square().sum().item() for tensor in tensors]
    assert kernels.squares(tensors) == pytest.approx(sums, rel=1e-12)


@pytest.mark.parametrize("size", [3, PART + 1])
def test_one_infinity_skips_the_tensor_on_demand(size: int) -> None:
    weight = nn.Parameter(torch.ones(size))
    optimizer = LARS([weight], lr=0.1, momentum=0.9, form="mlperf", nonfinite="skip")
    weight.grad = torch.ones(size)
    weight.grad[-1] = math.inf
    optimizer.step()
    assert weight.equal(torch.ones(size))
    assert optimizer.state[weight]["momentum_buffer"].equal(torch.zeros(size))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``threads(n)`` gives torch so many of them, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_rule
def test_the_number_of_threads_changes_no_bit(build: Build, threads: Callable[[int], None]) -> None:
    threads(1)
    one = stepped(build, torch.float32)
    for count in (2, 3, 5):
        threads(count)
        assert all(map(torch.equal, one, stepped(build, torch.float32)))


def test_no_thread_changes_a_weight_that_another_still_reads(
    threads: Callable[[int], None],
) -> None:
    """Where gradient and decay cancel, their norm is taken anew from the whole tensor."""
    start, noise = torch.randn(2, 50 * PART, generator=torch.Generator().manual_seed(0))

    def stepped_once(count: int) -> Tensor:
        threads(count)
        weight = nn.Parameter(start.clone())
        weight.grad = -0.5 * start + 1e-4 * noise
        LARS([weight], lr=1.0, weight_decay=0.5, form="optax", trust_coefficient=1.0).step()
        return weight.detach()

    one = stepped_once(1)
    for count in (2, 3, 5, 2, 3, 5):
        assert torch.equal(one, stepped_once(count))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize(("build", "lr"), [(LARS, 1.0), (LAMB, 1e-4)])
def test_a_parameter_listed_often_takes_its_steps_in_turn(
    build: Build, lr: float, threads: Callable[[int], None]
) -> None:
    threads(4)
    results = []
    for path in ("loop", "fused"):
        weight = nn.Parameter(torch.ones(PART - 1))
        weight.grad = torch.ones(PART - 1)
        build([weight] * 200, lr=lr, path=path).step()
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=0)


def cpus() -> list[tuple[str, ...]]:
    """Flags for kinds of CPUs that this one can stand in for."""
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        return [("-DONE_CPU", "-mcpu=native")]
    has = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    kinds = [("-DONE_CPU",)]
    if {"avx2", "fma"} <= has:
        kinds.append(("-DONE_CPU", "-mavx2", "-mfma"))
    if "avx512f" in has:
        kinds.append(("-DONE_CPU", "-mavx512f", "-mfma"))
    return kinds


@every_rule
@pytest.mark.parametrize("command", ["gcc", "clang"])
def test_neither_the_kind_of_cpu_nor_the_compiler_changes_a_bit(
    build: Build, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job may run on several kinds: its ranks would drift apart."""
    if shutil.which(command) is None:
        pytest.skip(f"no {command} here")
    monkeypatch.setenv("CC", command)
    results = [stepped(build, torch.float32)]
    for k, flags in enumerate(cpus()):
        library = tmp_path / f"{k}.so"
        arguments = [*compiler.FLAGS, *flags, "-DREAL=float", "-o", str(library)]
        compiler.run_compiler([*arguments, str(compiler.SOURCE)])
        loaded = kernels.declared(ctypes.CDLL(str(library)))
        monkeypatch.setattr(kernels, "_library", lambda _, loaded=loaded: loaded)
        results.append(stepped(build, torch.float32))
    assert len(results) > 1
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(("build", "name"), [(LARS, "momentum_buffer"), (LAMB, "exp_avg_sq")])
def test_a_state_of_other_shapes_is_an_error(build: Build, name: str) -> None:
    """A kernel would write beyond its end."""
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    optimizer = build([weight], **({"momentum": 0.9} if build is LARS else {}))
    optimizer.step()
    optimizer.state[weight][name] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()


def test_autograd_hears_of_the_change() -> None:
    weight = nn.Parameter(torch.ones(3))
    loss = (weight**2).sum()  # which keeps the weight for its backward
    weight.grad = torch.ones(3)
    LARS([weight], lr=0.1, path="fused").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (LARS, {"momentum": 0.9}),
        (LARS, {"momentum": 0.9, "weight_decay": 0.1}),
        (LARS, {"momentum": 0.9, "form": "optax"}),
        (LARS, {"momentum": 0.9, "weight_decay": 0.1, "form": "larc"}),
        (LAMB, {"form": "paper"}),
        (LAMB, {"form": "paper", "weight_decay": 0.1}),
        (LAMB, {"form": "paper", "weight_decay": 0.1, "decoupled_weight_decay": False}),
    ],
)
def test_a_broken_weight_spoils_no_more_than_in_the_loop(
    build: Build, options: dict[str, Any]
) -> None:
    results = []
    for path in ("loop", "fused"):
        weight = nn.Parameter(torch.tensor([math.nan, 1.0, 2.0]))
        weight.grad = torch.tensor([1.0, 2.0, 3.0])
        optimizer = build([weight], lr=0.1, path=path, **options)
        optimizer.step()
        results.append([weight.detach(), *optimizer.state[weight].values()])
    torch.testing.assert_close(*results, equal_nan=True)


def test_an_average_that_keeps_nothing_is_the_gradient() -> None:
    """To go from the old average all the way to a gradient of other size leaves a rounding error."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = LAMB([weight], betas=(0.0, 0.9), form="paper", path="fused")
    for grad in (1.0, 1e-12):
        weight.grad = torch.full((1,), grad)
        optimizer.step()
    assert optimizer.state[weight]["exp_avg"].equal(weight.grad)


@every_rule
def test_everything_that_a_step_changes_has_a_new_version(build: Build) -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = build([weight], path="fused")
    optimizer.step()
    tensors = [weight, *optimizer.state[weight].values()]
    before = [tensor._version for tensor in tensors]
    optimizer.step()
    assert all(tensor._version > old for tensor, old in zip(tensors, before, strict=True))


def test_a_group_without_ratio_decays_where_its_gradient_is_zero() -> None:
    """Only beside a ratio does larc leave the decay out, and only then is the norm looked at for that."""
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    options: dict[str, Any] = {"form": "larc", "adapt": False, "nonfinite": "skip"}
    LARS([weight], lr=0.5, weight_decay=0.5, path="fused", **options).step()
    assert weight.tolist() == [0.75] * 3


def test_the_stride_of_a_single_element_says_nothing() -> None:
    nhwc = torch.zeros(4, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    other = nhwc.as_strided(nhwc.shape, (6, 1, 99, 3))
    assert not nhwc.is_contiguous()
    assert kernels.takes(nhwc, other)
    assert kernels.takes(other, nhwc)


def test_tensors_without_memory_of_their_own_are_left_to_the_loop() -> None:
    """What says type Tensor and device cpu may be a wrapper, and its address null."""
    seen = []

    def ask(x: Tensor) -> Tensor:
        seen.append(kernels.takes(x))
        return x.sum()

    torch.func.functionalize(ask)(torch.ones(3))
    torch.func.grad(ask)(torch.ones(3))
    torch.vmap(ask)(torch.ones(2, 3))
    ask(torch._efficientzerotensor(3))
    ask(torch.frombuffer(bytearray(13), dtype=torch.float32, offset=1))  # not a float's address
    assert seen == [False] * 5


# ------------------------------------------------------------------------------------ the compiler


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lars-imagenet" / "kernels"


def test_it_compiles_once_and_keeps_what_it_made(
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


def test_what_cannot_be_kept_leaves_nothing_behind(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(compiler.os, "replace", no_space)
    assert isinstance(compiler.compiled("float"), ctypes.CDLL)
    assert list(empty_cache.iterdir()) == []


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here")
def test_the_threads_are_those_of_openmp_where_the_compiler_has_it(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "gcc")
    compiler.compiled("float")
    [kept] = empty_cache.iterdir()
    assert b"GOMP_parallel" in kept.read_bytes()


@pytest.mark.parametrize("command", ["gcc", "clang"])
def test_flags_of_the_compiler_change_nothing(
    empty_cache: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All hosts and compilers share what is kept."""
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


def test_a_root_is_no_call_of_a_function(empty_cache: Path) -> None:
    """As it is where -fmath-errno holds: LAMB is five times slower then."""
    compiler.compiled("float")
    [kept] = empty_cache.iterdir()
    assert b"sqrt" not in kept.read_bytes()


@pytest.mark.parametrize("length", [0, 10, 1000, 20_000, -1])
def test_a_damaged_library_is_made_anew(empty_cache: Path, length: int) -> None:
    """The system would load some of these, and end the process with a bus error."""
    compiler.compiled("float")
    [kept] = empty_cache.iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # for this process has it mapped
    kept.write_bytes(whole[:length])
    compiler.compiled("float")
    assert kept.stat().st_size == len(whole)


def test_many_ranks_may_compile_at_once(empty_cache: Path) -> None:
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


def test_the_cache_is_in_no_relative_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "~")  # what remains of it for a user without a name and $HOME
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
    ("cc", "path", "said"),
    [
        ("", "/nowhere", "there is no C compiler (cc, gcc or clang): install one, or set CC"),
        ("false", None, "false failed (no message): set CC to gcc or clang"),
        ("/nowhere/cc -O2", None, "/nowhere/cc cannot be run"),
        ("gcc '", None, "CC=gcc ' is not a command (No closing quotation)"),
    ],
)
def test_without_a_compiler_the_loop_is_taken_and_that_is_said_once(
    empty_cache: Path, cc: str, path: str | None, said: str
) -> None:
    with_path = {} if path is None else {"PATH": path}
    done = run(sys.executable, "-c", SCRIPT.format(more=""), CC=cc, **with_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(3 * (1 - 2e-4), rel=1e-6)
    assert done.stderr.count(said) == 1
    assert "A plain loop takes their place" in done.stderr
    asked = run(sys.executable, "-c", SCRIPT.format(more=", path='fused'"), CC=cc, **with_path)
    assert asked.returncode == 1
    assert said in asked.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("does", "said"),
    [("exec sleep 100", "timed out"), (r"printf '\377 no' >&2; exit 1", "failed \\(\ufffd no\\)")],
)
def test_a_compiler_may_hang_or_speak_another_encoding(
    does: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "cc"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    monkeypatch.setenv("CC", str(program))
    monkeypatch.setattr(compiler, "SECONDS", 0.5)
    with pytest.raises(compiler.CompilerError, match=said):
        compiler.run_compiler([])


def test_a_compiler_without_openmp_will_do(empty_cache: Path, tmp_path: Path) -> None:
    compiler_of_old = tmp_path / "cc"
    compiler_of_old.write_text(
        '#!/bin/sh\ncase "$*" in *-fopenmp*) echo no OpenMP >&2; exit 1;; esac\nexec gcc "$@"\n'
    )
    compiler_of_old.chmod(0o755)
    done = run(sys.executable, "-W", "error", "-c", SCRIPT.format(more=""), CC=str(compiler_of_old))
    assert done.returncode == 0, done.stderr


def test_neither_a_home_nor_an_encoding_is_needed(empty_cache: Path) -> None:
    """A container may run as a user without a name; kernels.c has letters that ASCII lacks."""
    homeless = f"""
import os
os.environ.pop("HOME"), os.environ.pop("XDG_CACHE_HOME")
os.path.expanduser = lambda path: path  # which is what it does for such a user
{SCRIPT.format(more="")}"""
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = run(sys.executable, "-X", "utf8=0", "-W", "error", "-c", homeless, **plain)
    assert (done.returncode, done.stderr) == (0, "")


def test_where_they_are_no_word_is_said() -> None:
    kernels.available.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.available()
