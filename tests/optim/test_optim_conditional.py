"""A step with found_inf = 1 changes no bit, one with 0 is an ordinary step, and the host does not read the flag."""

import copy
from typing import Any

import pytest
import torch
from optim_cases import RULES, Build, every_path
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, Adam, Optimizer, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode

from lars import LARSWrapper
from lars.optim.base import step_unless, takes_found_inf

BUILDS: dict[str, Build] = {
    **RULES,
    "nesterov": lambda params, **o: RULES["lars-nus"](params, nesterov=True, maximize=True, **o),
    "inside-nesterov": lambda params, **o: RULES["lars-optax"](params, nesterov=True, **o),
    "no-momentum": lambda params, **o: RULES["lars-nus"](params, momentum=0.0, **o),
    "skip": lambda params, **o: RULES["lars-nus"](params, nonfinite="skip", **o),
    "coupled": lambda params, **o: RULES["lamb-paper"](params, decoupled_weight_decay=False, **o),
    "wrapper-sgd": lambda params, path: LARSWrapper(SGD(params, lr=0.1, momentum=0.9)),
    "wrapper-adam": lambda params, path: LARSWrapper(Adam(params, lr=0.1, fused=True)),
}
# torch's kernel takes the first layout. The others are for the plain operations.
KINDS = [
    (torch.float32, "same"),
    (torch.float32, "mixed"),
    (torch.bfloat16, "same"),
]


def parameters(dtype: torch.dtype, layout: str) -> list[nn.Parameter]:
    """Parameters that hold -0.0, with finite gradients."""
    torch.manual_seed(0)
    weights = [torch.randn(4, 3, 2, 2), torch.randn(40), torch.full((5,), -0.0), torch.randn(())]
    weights[0][0] = -0.0
    params = [nn.Parameter(w.to(dtype)) for w in weights]
    for p in params:
        p.grad = torch.randn_like(p)
    if layout == "mixed":
        params[0].data = params[0].data.to(memory_format=torch.channels_last)
        params[0].grad = torch.randn(4, 3, 2, 2).to(dtype)
    return params


def bits(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: bits(v) for key, v in value.items()}
    return [bits(v) for v in value] if isinstance(value, list | tuple) else value


def everything(optimizer: Optimizer, params: list[nn.Parameter]) -> Any:
    return bits([params, optimizer.state_dict()])


@every_path
@pytest.mark.parametrize(("dtype", "layout"), KINDS)
@pytest.mark.parametrize("name", BUILDS)
def test_the_flag_decides_about_every_bit(
    name: str, dtype: torch.dtype, layout: str, path: str
) -> None:
    if name.startswith("wrapper") and (path != "foreach" or (dtype, layout) != KINDS[0]):
        return  # the wrapper has no paths, and torch's fused Adam is wrong in mixed layouts
    params = parameters(dtype, layout)
    optimizer = BUILDS[name](params, path=path)
    optimizer.step()
    twins = copy.deepcopy((params, optimizer))
    for p, twin in zip(params, twins[0], strict=True):
        twin.grad = p.grad

    before = everything(optimizer, params)
    kept = [p.grad for p in params]
    for bad in (float("nan"), float("inf"), 1.0):
        for p in params:
            p.grad = torch.full_like(p, bad)
        step_unless(torch.ones(()), optimizer)
        assert everything(optimizer, params) == before, bad
    for p, grad in zip(params, kept, strict=True):
        p.grad = grad
    step_unless(torch.zeros(()), optimizer)
    twins[1].step()
    assert everything(optimizer, params) == everything(twins[1], twins[0]) != before


@pytest.mark.parametrize("name", [name for name in BUILDS if name != "wrapper-adam"])
def test_the_host_does_not_read_the_flag_on_an_accelerator(name: str) -> None:
    with FakeTensorMode():
        params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in ((4, 3), (5,), ())]
        optimizer = BUILDS[name](params, path="auto")
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            step_unless(torch.zeros((), device="cuda"), optimizer)


class Traffic(TorchDispatchMode):
    """Counts the bytes of the large tensors that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.is_view:
            return result
        specs = {spec.name: spec for spec in function._schema.arguments}
        values = dict(zip(specs, args, strict=False)) | (kwargs or {})
        # The schema of the fused kernel says that it writes the gradients. It does so only with a grad_scale.
        written = {k for k in values if writes(specs[k]) and k != "grads"}
        self.bytes += size([v for k, v in values.items() if not specs[k].is_out])
        self.bytes += size([values[k] for k in written]) if written else size(result)
        return result


def writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def size(tree: Any) -> int:
    tensors = [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors if t.numel() > 100)


@pytest.mark.parametrize(
    ("name", "most"), [("lars-nus", 1.0), ("lars-mlperf", 1.0), ("tvlars", 1.0), ("lamb-nus", 1.12)]
)
def test_the_flag_costs_little_memory_traffic(name: str, most: float) -> None:
    counts = []
    for found_inf in (None, torch.zeros(())):
        params = [nn.Parameter(torch.randn(64, 64)) for _ in range(2)]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer: Any = BUILDS[name](params, path="foreach")
        optimizer.step()
        optimizer.found_inf = found_inf
        with Traffic() as traffic:
            optimizer.step()
        counts.append(traffic.bytes)
    assert 10 * 2 * 64 * 64 * 4 < counts[0] <= counts[1] <= most * counts[0], counts


def test_only_our_optimizers_and_fused_ones_take_the_flag() -> None:
    def params() -> list[nn.Parameter]:
        return [nn.Parameter(torch.ones(2, 2))]

    class Own(SGD):
        pass

    assert all(takes_found_inf(build(params(), path="auto")) for build in BUILDS.values())
    assert takes_found_inf(SGD(params(), fused=True))
    assert not takes_found_inf(SGD(params()))
    assert not takes_found_inf(Own(params(), fused=True))
    refused = LARSWrapper(RMSprop(params(), lr=0.1))
    assert not takes_found_inf(refused)
    with pytest.raises(RuntimeError, match="fused=True"):
        step_unless(torch.ones(()), refused)
    assert refused.found_inf is None
