"""Memory layouts: the update does not depend on them, and the kernels get only tensors that they can walk."""

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
