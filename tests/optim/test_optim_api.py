"""The optimizers behave as torch optimizers do: saving, copying, groups, closures."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from optim_cases import (
    GRADS,
    PATHS,
    START,
    Build,
    every_rule,
    run,
    step_through,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from lars import LAMB, LARS, TVLARS


@every_rule
def test_a_saved_and_loaded_run_continues_with_the_same_bits(rule: Build) -> None:
    straight = run(rule, START, GRADS)
    params = [nn.Parameter(x.clone()) for x in START]
    first = rule(params)
    step_through(first, params, GRADS[:3])
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    second = rule(resumed, lr=123.0)
    second.load_state_dict(torch.load(saved, weights_only=True))
    step_through(second, resumed, GRADS[3:])
    for got, want in zip(resumed, straight, strict=True):
        assert torch.equal(got, want)


@every_rule
def test_a_copied_optimizer_continues_with_the_same_bits(rule: Build) -> None:
    straight = run(rule, START, GRADS)
    params = [nn.Parameter(x.clone()) for x in START]
    optimizer = rule(params)
    step_through(optimizer, params, GRADS[:3])
    optimizer = copy.deepcopy(optimizer)
    params = optimizer.param_groups[0]["params"]
    step_through(optimizer, params, GRADS[3:])
    for got, want in zip(params, straight, strict=True):
        assert torch.equal(got, want)


@every_rule
def test_an_optimizer_rebuilt_from_its_groups_is_the_same(rule: Build) -> None:
    """Horovod's wrapper calls the class with the groups alone."""
    special = {"lr": 0.7, "weight_decay": 0.3, "nonfinite": "skip", "path": "loop", "adapt": False}
    params = [nn.Parameter(x.clone()) for x in START]
    original = rule(params, **special)
    step_through(original, params, GRADS[:2])
    groups = [dict(group) for group in original.param_groups]
    rebuilt = type(original)([dict(group) for group in groups])
    assert rebuilt.param_groups == groups  # including the step count of TVLARS
    assert groups[0].items() >= special.items()


@every_rule
def test_every_constructor_argument_but_params_has_a_default(rule: Build) -> None:
    optimizer = rule([nn.Parameter(torch.zeros(2))])
    type(optimizer)([nn.Parameter(torch.zeros(2))])


@every_rule
def test_groups_are_independent_and_may_be_added_later(rule: Build) -> None:
    params = [nn.Parameter(x.clone()) for x in START]
    optimizer = rule(params[:1])
    step_through(optimizer, params, [GRADS[0]])
    assert torch.equal(params[1], START[1])
    optimizer.add_param_group({"params": params[1:], "lr": 0.0})
    step_through(optimizer, params, [GRADS[1]])
    assert torch.equal(params[1], START[1])
    optimizer.param_groups[1]["lr"] = 0.1
    step_through(optimizer, params, [GRADS[2]])
    assert not torch.equal(params[1], START[1])
    if not isinstance(optimizer, LAMB):  # some forms of LAMB use the norm over all gradients
        alone = run(rule, START[:1], [g[:1] for g in GRADS[:3]])
        torch.testing.assert_close(params[0].detach(), alone[0], rtol=1e-12, atol=0)


@every_rule
def test_many_groups_step_like_one_group(rule: Build) -> None:
    together = run(rule, START, GRADS)
    apart = run(lambda params: rule([{"params": [p]} for p in params]), START, GRADS)
    torch.testing.assert_close(apart, together, rtol=1e-12, atol=1e-14)


@every_rule
def test_a_parameter_without_gradient_is_left_alone(rule: Build) -> None:
    params = [nn.Parameter(x.clone()) for x in START]
    optimizer = rule(params)
    step_through(optimizer, params, [[None, *GRADS[0][1:]]])
    assert torch.equal(params[0], START[0])
    assert params[0] not in optimizer.state
    optimizer.zero_grad()
    optimizer.step()


@every_rule
def test_the_closure_runs_with_gradients_and_its_loss_is_returned(rule: Build) -> None:
    weight = nn.Parameter(START[0].clone())
    optimizer = rule([weight])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    before = (weight**2).sum().item()
    assert optimizer.step(closure).item() == before
    assert not torch.equal(weight, START[0])


@every_rule
def test_sparse_gradients_are_refused(rule: Build) -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = rule(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not take sparse gradients: build the embedding"):
        optimizer.step()


@pytest.mark.parametrize("build", [LARS, TVLARS])
def test_training_continues_from_a_plain_state_without_a_buffer(
    build: Callable[..., Optimizer],
) -> None:
    param = nn.Parameter(START[0].clone())
    optimizer = build([param], momentum=0.9)
    state = optimizer.state_dict() | {"state": {0: {"momentum_buffer": None}}}
    optimizer.load_state_dict(state)  # some versions of torch's SGD save this at momentum 0
    param.grad = GRADS[0][0]
    optimizer.step()
    assert optimizer.state[param]["momentum_buffer"].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_step_counts_saved_as_plain_numbers_continue(path: str) -> None:
    def build(param: Tensor) -> LAMB:
        return LAMB([param], lr=0.1, form="paper", path=path)

    old, new = (nn.Parameter(START[0].clone()) for _ in range(2))
    first, second = build(old), build(new)
    for grad in GRADS[:3]:
        old.grad = grad[0]
        first.step()
    state = copy.deepcopy(first.state_dict())
    state["state"][0]["step"] = 3
    second.load_state_dict(state)
    with torch.no_grad():
        new.copy_(old)
    for param, optimizer in ((old, first), (new, second)):
        param.grad = GRADS[3][0]
        optimizer.step()
    assert torch.equal(old, new)


@pytest.mark.parametrize("build", [LARS, LAMB, TVLARS])
def test_options_survive_a_rebuild_and_a_plain_state(build: Callable[..., Optimizer]) -> None:
    def new(at: float) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.full((3,), at))

    first = build(
        [{"params": [new(1.0)]}, {"params": [new(2.0)], "adapt": False}], lr=0.7, nonfinite="skip"
    )
    rebuilt = build(first.param_groups)
    rebuilt.add_param_group({"params": [new(3.0)]})
    assert [group["nonfinite"] for group in rebuilt.param_groups] == ["skip"] * 3
    assert [group["lr"] for group in rebuilt.param_groups] == [0.7] * 3
    plain = torch.optim.SGD([{"params": [new(1.0)]}, {"params": [new(2.0)]}], lr=0.3)
    state = plain.state_dict()
    for group in state["param_groups"]:
        del group["weight_decay"], group["momentum"]
    first.load_state_dict(state)
    assert [(g["lr"], g["adapt"], g["nonfinite"]) for g in first.param_groups] == [
        (0.3, True, "skip"),
        (0.3, False, "skip"),
    ]
    for group in first.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    first.step()
