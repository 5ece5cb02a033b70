"""The CPU kernels: they match the loop, give the same bits on every CPU, and notify autograd."""

import ctypes
import math
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lars import LAMB, LARS, TVLARS
from lars.optim.cpu import compiler, kernels

Build = Callable[..., Optimizer]
PART = 16384  # as in kernels.c: larger tensors are split over the threads
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
    """Parameters of all sizes after steps; every other one misses a step."""
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
def test_the_kernels_match_the_loop_for_all_sizes(build: Build, dtype: torch.dtype) -> None:
    fused, loop = (stepped(build, dtype, path=path) for path in ("fused", "loop"))
    digits = {torch.float32: 1e-4, torch.float64: 1e-11}[dtype]
    for size, ours, reference in zip(SIZES, fused, loop, strict=True):
        torch.testing.assert_close(
            ours, reference, rtol=digits, atol=digits, msg=f"{size} elements"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_of_squares_includes_all_elements(dtype: torch.dtype) -> None:
    tensors = [torch.linspace(1, 2, n, dtype=dtype) for n in SIZES]
    sums = [tensor.double().square().sum().item() for tensor in tensors]
    assert kernels.squares(tensors) == pytest.approx(sums, rel=1e-12)


@pytest.mark.parametrize("size", [3, PART + 1])
def test_one_infinite_element_can_skip_the_tensor(size: int) -> None:
    weight = nn.Parameter(torch.ones(size))
    optimizer = LARS([weight], lr=0.1, momentum=0.9, form="mlperf", nonfinite="skip")
    weight.grad = torch.ones(size)
    weight.grad[-1] = math.inf
    optimizer.step()
    assert weight.equal(torch.ones(size))
    assert optimizer.state[weight]["momentum_buffer"].equal(torch.zeros(size))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``threads(n)`` sets the number of torch's threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_rule
def test_the_number_of_threads_does_not_change_a_bit(
    build: Build, threads: Callable[[int], None]
) -> None:
    threads(1)
    one = stepped(build, torch.float32)
    for count in (2, 3, 5):
        threads(count)
        assert all(map(torch.equal, one, stepped(build, torch.float32)))


def test_no_thread_writes_a_weight_that_another_still_reads(
    threads: Callable[[int], None],
) -> None:
    """Where gradient and decay cancel, one thread computes their norm again from the whole tensor."""
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
def test_a_parameter_listed_many_times_is_updated_sequentially(
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
    """Compiler flags of the kinds of CPUs whose code this CPU can run."""
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
def test_neither_the_cpu_nor_the_compiler_changes_a_bit(
    build: Build, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job may run on several kinds of CPUs. With different bits its ranks would drift apart."""
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
def test_a_state_of_another_shape_is_an_error(build: Build, name: str) -> None:
    """A kernel would write beyond the end of the tensor."""
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    optimizer = build([weight], **({"momentum": 0.9} if build is LARS else {}))
    optimizer.step()
    optimizer.state[weight][name] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()


def test_autograd_notices_the_update() -> None:
    weight = nn.Parameter(torch.ones(3))
    loss = (weight**2).sum()  # its backward pass needs the weight
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
def test_a_nonfinite_weight_affects_no_more_than_in_the_loop(
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


def test_an_average_with_beta_zero_is_exactly_the_gradient() -> None:
    """Computed as old + 1 * (gradient - old), it has a rounding error."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = LAMB([weight], betas=(0.0, 0.9), form="paper", path="fused")
    for grad in (1.0, 1e-12):
        weight.grad = torch.full((1,), grad)
        optimizer.step()
    assert optimizer.state[weight]["exp_avg"].equal(weight.grad)


@every_rule
def test_everything_that_a_step_changes_gets_a_new_version(build: Build) -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = build([weight], path="fused")
    optimizer.step()
    tensors = [weight, *optimizer.state[weight].values()]
    before = [tensor._version for tensor in tensors]
    optimizer.step()
    assert all(tensor._version > old for tensor, old in zip(tensors, before, strict=True))


def test_a_group_without_ratio_decays_where_its_gradient_is_zero() -> None:
    """Only with a trust ratio does larc omit the weight decay of a tensor with a zero norm."""
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    options: dict[str, Any] = {"form": "larc", "adapt": False, "nonfinite": "skip"}
    LARS([weight], lr=0.5, weight_decay=0.5, path="fused", **options).step()
    assert weight.tolist() == [0.75] * 3


def test_the_stride_of_a_dimension_of_size_one_is_ignored() -> None:
    nhwc = torch.zeros(4, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    other = nhwc.as_strided(nhwc.shape, (6, 1, 99, 3))
    assert not nhwc.is_contiguous()
    assert kernels.takes(nhwc, other)
    assert kernels.takes(other, nhwc)


def test_tensors_without_their_own_memory_are_left_to_the_loop() -> None:
    """A wrapper can have the type Tensor, the device cpu and a null address."""
    seen = []

    def ask(x: Tensor) -> Tensor:
        seen.append(kernels.takes(x))
        return x.sum()

    torch.func.functionalize(ask)(torch.ones(3))
    torch.func.grad(ask)(torch.ones(3))
    torch.vmap(ask)(torch.ones(2, 3))
    ask(torch._efficientzerotensor(3))
    ask(torch.frombuffer(bytearray(13), dtype=torch.float32, offset=1))  # not aligned
    assert seen == [False] * 5
