"""LARSWrapper is a torch optimizer, and works around any other."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RAdam, RMSprop
from torch.optim.lr_scheduler import StepLR

from lars import LAMB, LARS, TVLARS, LARSWrapper

Build = Callable[[Any], Optimizer]
BASES: dict[str, Build] = {
    "sgd": lambda params: SGD(params, lr=0.3, momentum=0.9, weight_decay=0.1),
    "sgd-nesterov": lambda params: SGD(
        params, lr=0.3, momentum=0.9, weight_decay=0.1, nesterov=True, maximize=True
    ),
    "sgd-dampening": lambda params: SGD(params, lr=0.3, momentum=0.9, dampening=0.5),
    "adam": lambda params: Adam(params, lr=0.3, weight_decay=0.1),
    "adamw": lambda params: AdamW(params, lr=0.3, weight_decay=0.1, maximize=True),
    "adagrad": lambda params: Adagrad(params, lr=0.3, weight_decay=0.1),
    "rmsprop": lambda params: RMSprop(params, lr=0.3, weight_decay=0.1),
    "radam": lambda params: RAdam(params, lr=0.3),
}
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())


def draw(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((6, 5), (4, 3, 2, 2), (7,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


START = draw(0)
GRADS = [draw(1 + k) for k in range(4)]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(x.clone()) for x in START]


def step(optimizer: Optimizer, params: list[nn.Parameter], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()


def adapted_by_hand(p: Tensor, g: Tensor, group: dict[str, Any], coefficient: float) -> Tensor:
    """The gradient for the wrapped optimizer, which changes the sign itself if it maximizes."""
    decay = group.get("weight_decay", 0.0)
    ratio = coefficient * p.norm() / (g.norm() + decay * p.norm() + 1e-8)
    return ratio * (g - decay * p if group.get("maximize") else g + decay * p)


@every_base
def test_the_wrapper_is_the_base_on_adapted_gradients(base: Build) -> None:
    ours, theirs = parameters(), parameters()
    wrapped = LARSWrapper(base(ours), trust_coef=0.02)
    plain = base(theirs)
    decayed = dict(plain.param_groups[0])
    if "weight_decay" in decayed:
        plain.param_groups[0]["weight_decay"] = 0.0
    for grads in GRADS:
        adapted = [
            adapted_by_hand(p.detach(), g, decayed, 0.02)
            for p, g in zip(theirs, grads, strict=True)
        ]
        step(plain, theirs, adapted)
        step(wrapped, ours, grads)
        for p, g in zip(ours, grads, strict=True):
            assert torch.equal(p.grad, g), "p.grad is not the wrapper's to change"
    assert wrapped.param_groups[0].get("weight_decay") == decayed.get("weight_decay")
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)


@every_base
def test_zero_norms_have_ratio_one(base: Build) -> None:
    """A zero weight moves by the plain gradient; with a zero gradient the weight decays."""
    grad, zero = GRADS[0][0], torch.zeros_like(START[0])
    for weight, gradient in ((zero, grad), (START[0], zero), (zero, zero)):
        ours, theirs = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
        wrapped, plain = LARSWrapper(base([ours])), base([theirs])
        decay = plain.param_groups[0].get("weight_decay", 0.0)
        if plain.param_groups[0].get("maximize"):
            decay = -decay
        if "weight_decay" in plain.param_groups[0]:
            plain.param_groups[0]["weight_decay"] = 0.0
        step(wrapped, [ours], [gradient])
        step(plain, [theirs], [gradient + decay * weight])
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@every_base
def test_a_saved_and_loaded_wrapper_continues_with_the_same_bits(base: Build) -> None:
    straight = parameters()
    optimizer = LARSWrapper(base(straight))
    for grads in GRADS:
        step(optimizer, straight, grads)

    params = parameters()
    first = LARSWrapper(base(params))
    for grads in GRADS[:2]:
        step(first, params, grads)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second = LARSWrapper(base(params), eps=1.0, trust_coef=9.0)
    second.load_state_dict(torch.load(saved, weights_only=True))
    assert second.param_groups is second.base.param_groups
    assert second.state is second.base.state
    for grads in GRADS[2:]:
        step(second, params, grads)
    for p, q in zip(params, straight, strict=True):
        assert torch.equal(p, q)


@every_base
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_wrapper_continues_with_the_same_bits(
    base: Build, duplicate: Callable[[Any], Any]
) -> None:
    params = parameters()
    optimizer = LARSWrapper(base(params))
    step(optimizer, params, GRADS[0])
    twin = duplicate(optimizer)
    twin_params = twin.param_groups[0]["params"]
    step(optimizer, params, GRADS[1])
    step(twin, twin_params, GRADS[1])
    for p, q in zip(params, twin_params, strict=True):
        assert p is not q
        assert torch.equal(p, q)
    assert twin.param_groups is twin.base.param_groups


@every_base
def test_an_optimizer_rebuilt_from_its_groups_is_the_same(base: Build) -> None:
    """Horovod's wrapper calls the class with the groups alone."""
    ours, theirs = parameters(), parameters()
    original = LARSWrapper(base(theirs), eps=1e-3, trust_coef=0.5)
    rebuilt = LARSWrapper(LARSWrapper(base(ours), eps=1e-3, trust_coef=0.5).param_groups)
    assert type(rebuilt.base) is type(original.base)
    for grads in GRADS:
        step(original, theirs, grads)
        step(rebuilt, ours, grads)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def test_the_wrapper_works_as_a_torch_optimizer() -> None:
    params = parameters()
    base = Adam(params[:1], lr=0.3)
    optimizer = LARSWrapper(base)
    assert isinstance(optimizer, Optimizer)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    step(optimizer, params[:1], GRADS[0][:1])
    scheduler.step()
    assert base.param_groups[0]["lr"] == 0.15
    optimizer.add_param_group({"params": params[1:], "lr": 0.0, "trust_coef": 0.25})
    assert len(base.param_groups) == 2
    assert base.param_groups[1]["lars_eps"] == 1e-8
    step(optimizer, params, GRADS[0])
    assert torch.equal(params[1], START[1])
    optimizer.zero_grad(set_to_none=False)
    assert params[0].grad.abs().sum() == 0
    optimizer.zero_grad(set_to_none=True)
    assert params[0].grad is None
    optimizer.step()
    assert "trust_coef: 0.25" in repr(optimizer)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.step()
    assert calls == [1]


def test_gradients_of_a_closure_are_adapted_too() -> None:
    for base in (BASES["sgd"], BASES["adam"]):
        with_closure, without = (nn.Parameter(START[0].clone()) for _ in range(2))
        first, second = LARSWrapper(base([with_closure])), LARSWrapper(base([without]))

        def closure(weight: nn.Parameter = with_closure) -> Tensor:
            weight.grad = None
            loss = (weight**2).sum()
            loss.backward()
            return loss

        assert first.step(closure).item() == (START[0] ** 2).sum().item()
        step(second, [without], [2 * START[0]])
        assert torch.equal(with_closure, without)


def test_two_steps_without_zero_grad_do_not_compound() -> None:
    """The published code writes the adapted gradient into p.grad, and would adapt it again."""
    for base in (BASES["sgd"], BASES["adam"]):
        once_set, set_twice = parameters(), parameters()
        first, second = LARSWrapper(base(once_set)), LARSWrapper(base(set_twice))
        step(first, once_set, GRADS[0])
        first.step()
        step(second, set_twice, GRADS[0])
        step(second, set_twice, GRADS[0])
        for p, q in zip(once_set, set_twice, strict=True):
            assert torch.equal(p, q)


def test_the_weight_decay_is_restored_after_an_error() -> None:
    class Failing(Adam):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("out of luck")

    [weight, *_] = parameters()
    optimizer = LARSWrapper(Failing([weight], weight_decay=0.5))
    with pytest.raises(RuntimeError, match="out of luck"):
        step(optimizer, [weight], GRADS[0][:1])
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert torch.equal(weight.grad, GRADS[0][0])


@every_base
def test_an_excluded_group_is_passed_on_untouched(base: Build) -> None:
    ours, theirs = parameters(), parameters()
    wrapped, plain = LARSWrapper(base([{"params": ours, "adapt": False}])), base(theirs)
    for grads in GRADS:
        step(wrapped, ours, grads)
        step(plain, theirs, grads)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@every_base
def test_a_nonfinite_gradient_is_not_hidden(base: Build) -> None:
    [weight, *_] = parameters()
    grad = GRADS[0][0].clone()
    grad[0, 0] = math.nan
    step(LARSWrapper(base([weight])), [weight], [grad])
    assert weight.isnan().all()


def test_a_grad_scaler_works_with_the_wrapper() -> None:
    for base in (BASES["sgd"], BASES["adam"]):
        scaled, plain = (nn.Parameter(START[0].float()) for _ in range(2))
        first, second = LARSWrapper(base([scaled])), LARSWrapper(base([plain]))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale((scaled**2).sum()).backward()
        scaler.step(first)
        scaler.update()
        step(second, [plain], [2 * START[0].float()])
        torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-7)
        before = scaled.detach().clone()
        scaled.grad = torch.full_like(scaled, math.inf)
        scaler.step(first)
        scaler.update()
        assert torch.equal(scaled, before)


def test_half_precision_does_not_lose_its_eps() -> None:
    """In float16 the published eps of 1e-8 is 0; here norms are computed in float32."""
    weight = nn.Parameter(torch.full((4,), 1e-4, dtype=torch.float16))
    before = weight.detach().clone()
    step(LARSWrapper(SGD([weight], lr=1.0), eps=1.0), [weight], [torch.full_like(before, 1e-4)])
    moved = (before - weight.detach()).float().abs().max()
    assert moved < 1e-6


@every_base
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_scalar_can_be_a_parameter(base: Build, dtype: torch.dtype) -> None:
    number = nn.Parameter(torch.ones((), dtype=dtype))
    step(LARSWrapper(base([number]), trust_coef=1.0), [number], [torch.ones_like(number)])
    assert number.isfinite()
    assert number != 1


def test_wrapping_again_replaces_the_options() -> None:
    base = SGD(parameters(), lr=0.1)
    LARSWrapper(base)
    again = LARSWrapper(base, eps=0.5, trust_coef=0.02)
    again.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    rules = [(group["lars_eps"], group["trust_coef"]) for group in again.param_groups]
    assert rules == [(0.5, 0.02)] * 2


def test_a_rebuilt_wrapper_gives_later_groups_the_same_options() -> None:
    first = LARSWrapper(SGD(parameters(), lr=0.1, momentum=0.9), eps=0.5, trust_coef=0.02)
    rebuilt = LARSWrapper(first.param_groups)
    rebuilt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    names = ("lr", "momentum", "lars_eps", "trust_coef")
    rules = [tuple(group[name] for name in names) for group in rebuilt.param_groups]
    assert rules == [(0.1, 0.9, 0.5, 0.02)] * 2


def test_the_state_of_the_wrapped_optimizer_can_be_loaded_alone() -> None:
    params = parameters()
    plain = SGD(params, lr=0.3, momentum=0.9)
    step(plain, params, GRADS[0])
    wrapped = LARSWrapper(SGD(params, lr=0.1), trust_coef=0.02)
    calls: list[str] = []
    wrapped.register_load_state_dict_post_hook(lambda optimizer: calls.append("loaded"))
    wrapped.load_state_dict(plain.state_dict())
    group = wrapped.param_groups[0]
    assert (group["lr"], group["momentum"], group["trust_coef"]) == (0.3, 0.9, 0.02)
    assert calls == ["loaded"]
    step(wrapped, params, GRADS[1])


def test_a_group_added_later_belongs_to_the_wrapped_optimizer() -> None:
    class Counting(Adam):
        """An optimizer that gives its groups a value of their own."""

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            super().add_param_group(param_group | {"steps": 0})

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["steps"] += 1
            return super().step(closure)

    params = parameters()
    wrapped = LARSWrapper(Counting(params[:1], lr=0.1))
    wrapped.add_param_group({"params": params[1:]})
    step(wrapped, params, GRADS[0])
    assert [group["steps"] for group in wrapped.param_groups] == [1, 1]


def test_bad_arguments_are_refused() -> None:
    params = parameters()
    with pytest.raises(TypeError, match="LARSWrapper wraps an optimizer"):
        LARSWrapper(123)
    with pytest.raises(ValueError, match=r"eps=-1\.0 must be finite and 0 or more"):
        LARSWrapper(SGD(params), eps=-1.0)
    with pytest.raises(ValueError, match=r"trust_coef=-0\.1 must be finite and 0 or more"):
        LARSWrapper(SGD(params), trust_coef=-0.1)
    with pytest.raises(TypeError, match="does not take LBFGS"):
        LARSWrapper(LBFGS(params))
    with pytest.raises(TypeError, match="LARSWrapper wraps an optimizer"):
        LARSWrapper(params)
    for base in (LARS(params), LAMB(params), TVLARS(params), LARSWrapper(SGD(params))):
        name = type(base).__name__
        message = f"LARSWrapper does not take {name}, which has a trust ratio already"
        with pytest.raises(TypeError, match=message):
            LARSWrapper(base)
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = LARSWrapper(SGD(embedding.parameters(), lr=0.1))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not take sparse gradients"):
        optimizer.step()
