"""A step on an accelerator reads no value back to the host, and can be compiled.

Fake tensors have a device and a shape but no values, and reading a value (`item`, `tolist`, `bool`)
raises an error. The tests run the step on fake CUDA tensors, with or without a GPU. On a GPU they
also run it with CUDA's check for synchronization, and capture it in a CUDA graph.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim import SGD, Adam, Optimizer

from lars import LAMB, LARS, TVLARS, LARSWrapper
from lars.names import LAMB_FORMS, LARS_FORMS
from lars.optim.base import choose_path

Build = Callable[[list[Any]], Optimizer]

EVERY: dict[str, Build] = {
    "lars-tensor-lr": lambda groups: LARS(groups, lr=torch.tensor(0.1), momentum=0.9, form="larc"),
    "lars-nesterov": lambda groups: LARS(groups, momentum=0.9, nesterov=True, maximize=True),
    "lamb-adam": lambda groups: LAMB(groups, weight_decay=1e-3, decoupled_weight_decay=False),
    "tvlars": lambda groups: TVLARS(groups),
    "wrapper-sgd": lambda groups: LARSWrapper(SGD(groups, lr=0.1, momentum=0.9)),
    "wrapper-adam": lambda groups: LARSWrapper(Adam(groups, lr=0.1, foreach=True)),
}
for nonfinite in ("propagate", "skip"):
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 1e-3, "nonfinite": nonfinite}
    for form in LARS_FORMS:
        EVERY[f"lars-{form}-{nonfinite}"] = partial(LARS, momentum=0.9, form=form, **options)
    for form in LAMB_FORMS:
        EVERY[f"lamb-{form}-{nonfinite}"] = partial(LAMB, form=form, **options)


def cuda_parameters() -> list[nn.Parameter]:
    shapes = ((64, 32), (8, 3, 3), (64,), ())
    return [nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]


def groups_of(*params: nn.Parameter) -> list[dict[str, Any]]:
    matrices = [p for p in params if p.ndim > 1]
    vectors = [p for p in params if p.ndim <= 1]
    return [
        {"params": matrices},
        {"params": vectors, "weight_decay": 0.0, "adapt": False},
    ]


@pytest.mark.parametrize("build", EVERY.values(), ids=EVERY.keys())
def test_a_step_reads_no_value_of_a_tensor(build: Build) -> None:
    with FakeTensorMode():
        params = cuda_parameters()
        optimizer = build(groups_of(*params))
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()


@pytest.mark.parametrize("ask", [torch.Tensor.item, bool])
def test_the_check_detects_a_value_that_is_read(ask: Callable[[torch.Tensor], Any]) -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        ask(cuda_parameters()[-1])


def test_every_device_except_the_cpu_uses_foreach() -> None:
    assert choose_path(torch.device("cuda")) == "foreach"
    assert choose_path(torch.device("xpu")) == "foreach"
    assert choose_path(torch.device("cpu")) == "fused"


@pytest.mark.parametrize(
    "build",
    [
        lambda groups: LARS(groups, lr=torch.tensor(0.1), momentum=0.9, weight_decay=1e-3),
        lambda groups: LAMB(groups, lr=torch.tensor(0.1), weight_decay=1e-3, form="paper"),
        lambda groups: TVLARS(groups, lr=torch.tensor(0.1)),
    ],
    ids=["lars", "lamb", "tvlars"],
)
def test_a_compiled_step_takes_the_same_steps(build: Build) -> None:
    """There is no graph break, and no recompilation when the rate and the step count change."""
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(2, 3), torch.randn(3)]
    grads = [[torch.randn_like(x) for x in start] for _ in range(4)]
    results = []
    compiled_frames = CompileCounter()
    for compiled in (False, True):
        params = [nn.Parameter(x.clone()) for x in start]
        optimizer = build(groups_of(*params))

        def step(optimizer: Optimizer = optimizer) -> None:
            optimizer.step()

        if compiled:
            # Only the front end, which runs the traced graph. Generating C++ would test the compiler
            # instead, and would need one.
            step = torch.compile(step, backend=compiled_frames, fullgraph=True)
        for k in range(4):
            for p, g in zip(params, grads[k], strict=True):
                p.grad = g.clone()
            for group in optimizer.param_groups:
                group["lr"].fill_(0.1 / (k + 1))
            step()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert compiled_frames.frame_count <= 2  # the first step creates the state, later steps find it


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("build", EVERY.values(), ids=EVERY.keys())
def test_a_step_on_cuda_does_not_synchronize(build: Build) -> None:
    params = cuda_parameters()
    optimizer = build(groups_of(*params))
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_a_step_on_cuda_can_be_captured_in_a_graph() -> None:
    torch.manual_seed(0)
    start = torch.randn(64, 32, device="cuda")
    grads = [torch.randn_like(start) for _ in range(6)]
    results = []
    for captured in (False, True):
        weight = nn.Parameter(start.clone())
        weight.grad = torch.zeros_like(weight)
        lr = torch.tensor(0.1, device="cuda")
        optimizer = LARS([weight], lr=lr, momentum=0.9, weight_decay=1e-3)
        graph = torch.cuda.CUDAGraph()
        for k, grad in enumerate(grads):
            weight.grad.copy_(grad)
            lr.fill_(0.1 / (k + 1))
            if not captured or k == 0:
                optimizer.step()
            elif k == 1:
                with torch.cuda.graph(graph):
                    optimizer.step()
                graph.replay()
            else:
                graph.replay()
        results.append(weight.detach())
    torch.testing.assert_close(results[1], results[0])
