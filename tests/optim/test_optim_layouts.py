"""Memory layouts: the update does not depend on them, and the kernels get only tensors that they can walk."""

from typing import Any

import pytest
import torch
from optim_cases import (
    GRADS,
    LAYOUTS,
    START,
    Build,
    every_rule,
    make,
    run,
    seeded,
    step_through,
)
from torch import Tensor, nn

from lars import LAMB, LARS, TVLARS
from lars.optim.cpu import kernels


@every_rule
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_the_update(rule: Build, layout: str) -> None:
    """The CPU kernels ignore strides, so other tensors are left to the loop."""
    weight, grads = make("ordinary", layout, torch.float64, seed=7)
    plain = run(rule, [weight.contiguous()], [[g.contiguous()] for g in grads])
    params = [nn.Parameter(weight)]
    step_through(rule(params), params, [[g] for g in grads])
    torch.testing.assert_close(params[0].detach(), plain[0], rtol=1e-12, atol=1e-14)


def test_the_kernel_itself_is_wrong_on_mixed_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Therefore the guard is necessary, and it detects them."""
    weight, [grad, *_] = make("ordinary", "mixed", torch.float64, seed=7)
    assert not kernels.takes(weight, grad)
    [right] = run(lambda p: LARS(p, path="fused"), [weight], [[grad]])
    monkeypatch.setattr(kernels, "takes", lambda *_: True)
    [wrong] = run(lambda p: LARS(p, path="fused"), [weight], [[grad]])
    assert not torch.allclose(wrong, right, atol=1e-6)


def test_the_guard_takes_only_dense_tensors() -> None:
    x = torch.zeros(4, 3, 2, 2)
    assert kernels.takes(x, x.clone())
    nhwc = x.contiguous(memory_format=torch.channels_last)
    assert kernels.takes(nhwc, nhwc.clone(memory_format=torch.preserve_format))
    assert kernels.takes(x.transpose(0, 2), x.clone().transpose(0, 2))
    assert kernels.takes(torch.tensor(1.0), torch.tensor(1.0))
    assert kernels.takes(torch.zeros(0, 3), torch.zeros(0, 3))
    column = torch.zeros(4, 3, 1, 1)  # the strides of its last dimensions do not matter
    assert kernels.takes(column, column.contiguous(memory_format=torch.channels_last))
    assert not kernels.takes(x, nhwc)
    assert not kernels.takes(nhwc, x)
    assert not kernels.takes(x[:, ::2], x[:, ::2].clone())
    assert not kernels.takes(x[:, ::2], x[:, ::2])
    assert not kernels.takes(torch.zeros(1).expand(4), torch.zeros(1).expand(4))
    assert not kernels.takes(x, x.double())
    assert not kernels.takes(x, x[:2])
    assert not kernels.takes(x, x.flatten())
    assert not kernels.takes(x.bfloat16(), x.bfloat16())
    assert not kernels.takes(x.to(torch.complex64), x.to(torch.complex64))
    assert not kernels.takes(x.to("meta"), x.to("meta"))
    assert not kernels.takes(x, torch._neg_view(x))
    assert not kernels.takes(x, x.as_subclass(type("Other", (Tensor,), {})))


@pytest.mark.parametrize("build", [LARS, LAMB, TVLARS])
def test_a_negated_view_is_read_correctly(build: Build) -> None:
    weight, grad = START[0], GRADS[0][0]
    [plain] = run(build, [weight], [[-grad]])
    param = nn.Parameter(weight.clone())
    param.grad = torch._neg_view(grad.clone())
    build([param]).step()
    torch.testing.assert_close(param.detach(), plain, rtol=1e-12, atol=0)


def test_gradients_may_be_views_of_one_flat_buffer() -> None:
    """The trainer keeps gradients like this: each view has the strides of its parameter."""
    weights = [make("ordinary", layout, torch.float64, seed=3)[0] for layout in LAYOUTS[:2]]
    grads = seeded(5, *(w.shape for w in weights))
    flat = torch.zeros(sum(w.numel() for w in weights), dtype=torch.float64)
    params = [nn.Parameter(w.clone(memory_format=torch.preserve_format)) for w in weights]
    offset = 0
    for p, g in zip(params, grads, strict=True):
        p.grad = flat[offset : offset + p.numel()].as_strided(p.shape, p.stride(), offset)
        p.grad.copy_(g)
        offset += p.numel()
    LARS(params, lr=1.0, momentum=0.9).step()
    plain = run(lambda p: LARS(p, lr=1.0, momentum=0.9), weights, [list(grads)])
    torch.testing.assert_close([p.detach() for p in params], plain, rtol=1e-12, atol=0)


# ------------------------------------------------- layouts that change between the steps of one optimizer


def changed(param: nn.Parameter, state: dict[str, Any], what: str) -> None:
    """Change the layout of one tensor to channels_last, without a new parameter."""
    nhwc = torch.channels_last
    if what == "gradient":
        param.grad = param.grad.contiguous(memory_format=nhwc)
    elif what == "data of the gradient":
        param.grad.data = param.grad.data.contiguous(memory_format=nhwc)
    elif what == "strides of the gradient":
        by_rows = param.grad.permute(0, 2, 3, 1).contiguous()
        param.grad.copy_(by_rows.view(param.grad.shape))  # the same memory, in the other order
        rows = param.grad.stride(0)
        param.grad.as_strided_(param.grad.shape, (rows, 1, 6, 3))
    elif what == "data of the parameter":
        param.data = param.data.contiguous(memory_format=nhwc)
    else:
        for name in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
            if name in state:
                state[name] = state[name].contiguous(memory_format=nhwc)


CHANGES = (
    "gradient",
    "data of the gradient",
    "strides of the gradient",
    "data of the parameter",
    "state",
)


@every_rule
@pytest.mark.parametrize("what", CHANGES)
def test_a_layout_that_changes_between_steps_reaches_no_kernel_unseen(
    rule: Build, what: str
) -> None:
    """The layouts of the step before were recognized; those of this step are others."""
    weight, grads = make("ordinary", "contiguous", torch.float64, seed=7)
    [plain] = run(rule, [weight], [[g] for g in grads])
    param = nn.Parameter(weight.clone())
    optimizer = rule([param])
    for k, grad in enumerate(grads):
        param.grad = grad.clone()
        if k == 2:
            changed(param, optimizer.state[param], what)
        optimizer.step()
    torch.testing.assert_close(param.detach(), plain, rtol=1e-12, atol=1e-14)


@every_rule
def test_layouts_of_the_last_step_are_not_tested_one_by_one(
    rule: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With new gradients too, a step over many small tensors takes little more time than SGD."""
    calls = []
    takes = kernels.takes
    monkeypatch.setattr(kernels, "takes", lambda *tensors: calls.append(1) or takes(*tensors))
    params = [nn.Parameter(x.clone()) for x in START]
    optimizer = rule(params)
    for step in GRADS:
        before = len(calls)
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    assert len(calls) == before > 0


@every_rule
def test_the_step_does_not_depend_on_the_guards_of_torch(
    rule: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_guards = run(rule, START, GRADS)
    monkeypatch.setattr(kernels, "_TensorGuards", None)
    assert all(map(torch.equal, run(rule, START, GRADS), with_guards))


def test_the_kernels_themselves_refuse_memory_that_is_not_aligned() -> None:
    odd = torch.frombuffer(bytearray(13), dtype=torch.float32, offset=1)
    good = torch.ones(3)
    rule = LARS([nn.Parameter(good)])._rule(LARS([nn.Parameter(good)]).param_groups[0])
    assert not kernels.lars([good], [odd], [], rule)
    assert not kernels.lars([good, odd], [good, good], [], rule)
    assert kernels.squares([odd]) is None
    assert good.tolist() == [1.0] * 3
    assert kernels.squares([torch.ones(0), good]) == [0.0, 3.0]


def test_gradients_that_lose_their_alignment_are_left_to_the_loop() -> None:
    """Their layout stays the same, so only the kernel notices."""
    results = []
    for offset in (0, 1):
        weight = nn.Parameter(torch.ones(3))
        optimizer = LARS([weight], lr=0.5, momentum=0.9)
        for where in (0, 0, offset):
            memory = bytearray(12 + where)
            weight.grad = torch.frombuffer(memory, dtype=torch.float32, offset=where).fill_(2)
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)
