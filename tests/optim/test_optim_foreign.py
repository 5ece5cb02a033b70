"""Groups and states of other implementations: taken over, or refused by name."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import GRADS, START, Build, every_rule, step_through
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lars import LAMB, LARS, TVLARS, LARSWrapper
from lars.names import LAMB_FORMS

State = dict[str, Any]

SGDS: dict[str, Callable[..., Optimizer]] = {
    "lars": lambda params, **options: LARS(params, **{"lr": 0.1, "momentum": 0.9} | options),
    "tvlars": lambda params, **options: TVLARS(params, **{"lr": 0.1} | options),
    "wrapper": lambda params, **options: LARSWrapper(
        SGD(params, **{"lr": 0.1, "momentum": 0.9} | options)
    ),
}
every_sgd = pytest.mark.parametrize("build", SGDS.values(), ids=SGDS.keys())


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(x.clone()) for x in START]


def resumed(build: Build, translate: Callable[[State], None]) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters after an unbroken run, and after one that goes through a translated state."""
    straight, params = parameters(), parameters()
    step_through(build(straight), straight, GRADS)
    first = build(params)
    step_through(first, params, GRADS[:3])
    state = copy.deepcopy(first.state_dict())
    translate(state)
    before = copy.deepcopy(state)
    second = build(params)
    second.load_state_dict(state)
    torch.testing.assert_close(state["state"], before["state"], rtol=0, atol=0)
    assert state["param_groups"] == before["param_groups"], "the caller's state changed"
    step_through(second, params, GRADS[3:])
    return [p.detach() for p in straight], [p.detach() for p in params]


# ------------------------------------------------------------------------------------------ states


@pytest.mark.parametrize("form", LAMB_FORMS)
@pytest.mark.parametrize("kind", [int, float, torch.tensor, lambda n: torch.tensor([n])])
def test_a_step_count_in_the_group_is_that_of_its_parameters(
    form: str, kind: Callable[[int], Any]
) -> None:
    """timm.Lamb, pytorch_optimizer.Lamb and apex.FusedLAMB keep it there."""

    def into_the_group(state: State) -> None:
        for own in state["state"].values():
            del own["step"]
        for group in state["param_groups"]:
            group["step"] = kind(3)

    straight, got = resumed(lambda params: LAMB(params, lr=0.1, form=form), into_the_group)
    assert all(map(torch.equal, got, straight))


def test_each_group_has_its_own_step_count() -> None:
    params = parameters()[:2]
    optimizer = LAMB([{"params": [p]} for p in params], form="paper")
    state = optimizer.state_dict()
    for key, p in enumerate(params):
        state["state"][key] = {"exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}
        state["param_groups"][key]["step"] = 10 + key
    optimizer.load_state_dict(state)
    assert [optimizer.state[p]["step"].item() for p in params] == [10, 11]
    assert all("step" not in group for group in optimizer.param_groups)


def test_values_that_others_keep_for_logging_do_no_harm() -> None:
    def with_logs(state: State) -> None:
        for own in state["state"].values():
            own |= {"weight_norm": torch.tensor(3.0), "trust_ratio": 1.5}

    straight, got = resumed(lambda params: LAMB(params, lr=0.1), with_logs)
    assert all(map(torch.equal, got, straight))


@every_sgd
def test_a_momentum_buffer_called_mu_is_taken_over(build: Build) -> None:
    """As in Barlow Twins, VICReg, VISSL, MAE, MoCo v3 and KhoiDOO/tvlars."""

    def renamed(state: State) -> None:
        for own in state["state"].values():
            own["mu"] = own.pop("momentum_buffer")

    straight, got = resumed(build, renamed)
    assert all(map(torch.equal, got, straight))


@pytest.mark.parametrize("missing", ["step", "exp_avg", "exp_avg_sq"])
def test_half_a_state_of_lamb_is_refused(missing: str) -> None:
    params = parameters()
    optimizer = LAMB(params)
    step_through(optimizer, params, GRADS[:1])
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0][missing]
    before = [value.clone() for value in optimizer.state[params[0]].values()]
    with pytest.raises(ValueError, match=f"LAMB cannot continue .* lacks {missing} of parameter 0"):
        optimizer.load_state_dict(state)
    assert all(map(torch.equal, optimizer.state[params[0]].values(), before))


@every_sgd
@pytest.mark.parametrize("other", [Adam, LAMB])
def test_moments_of_adam_are_refused_where_momentum_is_kept(
    build: Build, other: Callable[..., Optimizer]
) -> None:
    params = parameters()
    first = other(params, lr=0.1)
    step_through(first, params, GRADS[:1])
    message = "it has exp_avg, exp_avg_sq, and .* keeps momentum_buffer"
    with pytest.raises(ValueError, match=message):
        build(params).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda params: SGD(params, lr=0.1, momentum=0.9), "momentum_buffer"),
        (lambda params: AdamW(params, amsgrad=True), "amsgrad=True"),
        (lambda params: AdamW(params, maximize=True), "maximize=True"),
    ],
)
def test_states_that_lamb_cannot_continue_are_refused(build: Build, names: str) -> None:
    params = parameters()
    first = build(params)
    step_through(first, params, GRADS[:1])
    with pytest.raises(ValueError, match=f"LAMB cannot continue this state: it .*{names}"):
        LAMB(params).load_state_dict(first.state_dict())


def test_moments_without_gradient_averaging_are_refused() -> None:
    """With grad_averaging=False (timm, apex) the first moment is 1 / (1 - beta1) times as large."""
    params = parameters()
    optimizer = LAMB(params)
    state = optimizer.state_dict()
    for value in (0, False):
        state["param_groups"][0]["grad_averaging"] = value
        with pytest.raises(ValueError, match=f"saved with grad_averaging={value}, and LAMB has no"):
            optimizer.load_state_dict(state)
    state["param_groups"][0]["grad_averaging"] = 1
    optimizer.load_state_dict(state)


def test_dampening_is_refused_where_it_does_not_exist() -> None:
    params = parameters()
    state = SGD(params, lr=0.1, momentum=0.9, dampening=0.5).state_dict()
    for build in (LARS, TVLARS):
        with pytest.raises(ValueError, match=r"saved with dampening=0\.5, and .* no such option"):
            build(params).load_state_dict(state)
    LARSWrapper(SGD(params, lr=0.1)).load_state_dict(state)  # SGD itself has it


def test_a_state_of_sgd_without_momentum_holds_nothing_to_lose() -> None:
    params = parameters()
    optimizer = LAMB(params)
    optimizer.load_state_dict(
        SGD(params, lr=0.1).state_dict() | {"state": {0: {"momentum_buffer": None}}}
    )
    step_through(optimizer, params, GRADS[:1])


@pytest.mark.parametrize("kind", [int, float, torch.tensor])
def test_tvlars_continues_from_a_step_count_of_any_kind(kind: Callable[[int], Any]) -> None:
    def plain(state: State) -> None:
        for group in state["param_groups"]:
            group["step"] = kind(3)

    straight, got = resumed(lambda params: TVLARS(params, lr=0.1, lmbda=0.5), plain)
    assert all(map(torch.equal, got, straight))


# ------------------------------------------------------------------------------------------ groups


@pytest.mark.parametrize(
    ("foreign", "own"),
    [
        ({"lars": False}, {"adapt": False}),
        ({"lars": True}, {"adapt": True}),
        ({"lars_exclude": True}, {"adapt": False}),
        ({"is_skipped": True}, {"adapt": False}),
        ({"eeta": 0.5, "epsilon": 0.25}, {"trust_coefficient": 0.5, "eps": 0.25}),
        ({"trust_coeff": 0.5}, {"trust_coefficient": 0.5}),
        ({"lars": False, "adapt": False}, {"adapt": False}),
    ],
)
def test_the_options_of_other_projects_are_honoured(foreign: State, own: State) -> None:
    for form in ({}, {"form": "mlperf"}):
        group = {"params": [nn.Parameter(torch.ones(2))]} | foreign | form
        [got] = LARS([group]).param_groups
        assert got.items() >= own.items()
        assert not (foreign.keys() - own.keys()) & got.keys()


@every_rule
def test_a_group_with_lars_false_has_no_trust_ratio(rule: Build) -> None:
    results = []
    for name in ("lars", "adapt"):
        params = parameters()
        optimizer = rule([{"params": params[:1]}, {"params": params[1:], name: False}])
        step_through(optimizer, params, GRADS)
        results.append(params)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("base", [SGD, AdamW])
@pytest.mark.parametrize("later", [False, True])
def test_the_wrapper_passes_on_a_group_with_lars_false(
    base: Callable[..., Optimizer], later: bool
) -> None:
    ours, plain = parameters()[:2], parameters()[:2]
    group: State = {"params": ours[1:], "lars": False}
    if later:
        wrapped = LARSWrapper(base(ours[:1], lr=0.1))
        wrapped.add_param_group(group)
    else:
        wrapped = LARSWrapper(base([{"params": ours[:1]}, group], lr=0.1))
    grads = [step[:2] for step in GRADS]
    step_through(wrapped, ours, grads)
    step_through(base(plain, lr=0.1), plain, grads)
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-12, atol=0)
    assert not torch.allclose(ours[0], plain[0])


@every_rule
def test_contradictory_options_are_refused(rule: Build) -> None:
    message = re.escape("lars=False and adapt=True, which contradict each other; keep adapt")
    with pytest.raises(ValueError, match=message):
        rule([{"params": parameters(), "lars": False, "adapt": True}])


def test_the_groups_of_a_nus_checkpoint_are_read() -> None:
    params = parameters()
    optimizer = LARS([{"params": params[:1]}, {"params": params[1:]}], momentum=0.9)
    state = optimizer.state_dict()
    shared = {"lr": 0.5, "momentum": 0.8, "weight_decay": 0.1, "eeta": 0.01, "epsilon": 1e-5}
    state["param_groups"] = [
        shared | {"lars": True, "params": [0]},
        shared | {"lars": False, "params": list(range(1, len(params)))},
    ]
    optimizer.load_state_dict(state)
    for group, adapt in zip(optimizer.param_groups, (True, False), strict=True):
        want = {"lr": 0.5, "trust_coefficient": 0.01, "eps": 1e-5, "adapt": adapt, "form": "nus"}
        assert group.items() >= want.items()
        assert not {"eeta", "epsilon", "lars"} & group.keys()


# -------------------------------------------------------------------------------------- parameters


@every_rule
def test_empty_groups_are_allowed_as_in_torch(rule: Build) -> None:
    with_empty, plain = parameters(), parameters()
    optimizer = rule([{"params": []}, {"params": with_empty}, {"params": []}])
    optimizer.add_param_group({"params": []})
    step_through(optimizer, with_empty, GRADS[:2])
    rebuilt = type(optimizer)(optimizer.param_groups)
    rebuilt.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step_through(rebuilt, with_empty, GRADS[2:])
    step_through(rule(plain), plain, GRADS)
    for one, other in zip(with_empty, plain, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="empty parameter list"):
        rule([])


@pytest.mark.parametrize("base", [SGD, AdamW])
def test_the_wrapper_takes_empty_groups(base: Callable[..., Optimizer]) -> None:
    params = parameters()
    optimizer = LARSWrapper(base([{"params": []}, {"params": params}], lr=0.1))
    optimizer.add_param_group({"params": []})
    step_through(optimizer, params, GRADS)
    rebuilt = LARSWrapper(optimizer.param_groups)
    step_through(rebuilt, params, GRADS)


@every_rule
def test_an_optimizer_can_be_rebuilt_from_its_defaults(rule: Build) -> None:
    original = rule(parameters(), nonfinite="skip")
    rebuilt = type(original)(parameters(), **original.defaults)
    assert rebuilt.defaults == original.defaults


@every_rule
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_refused(rule: Build, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(3, dtype=dtype))
    for adapt in (True, False):
        with pytest.raises(TypeError, match="does not take complex parameters"):
            rule([{"params": [weight], "adapt": adapt}])
    optimizer = rule(parameters())
    with pytest.raises(TypeError, match="does not take complex parameters"):
        optimizer.add_param_group({"params": [weight]})


@pytest.mark.parametrize("base", [SGD, AdamW])
def test_the_wrapper_refuses_complex_parameters(base: Callable[..., Optimizer]) -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="LARSWrapper does not take complex parameters"):
        LARSWrapper(base([weight], lr=0.1))
    optimizer = LARSWrapper(base(parameters(), lr=0.1))
    with pytest.raises(TypeError, match="LARSWrapper does not take complex parameters"):
        optimizer.add_param_group({"params": [weight]})


@pytest.mark.parametrize("build", [LARS, LAMB, TVLARS])
def test_an_optimizer_instead_of_parameters_is_refused(build: Callable[..., Optimizer]) -> None:
    """In torchlars, LARS is the wrapper."""
    with pytest.raises(TypeError, match=r"LARSWrapper\(optimizer\) puts a trust ratio around"):
        build(SGD(parameters(), lr=0.1))


@every_rule
@pytest.mark.parametrize(
    ("options", "dtype"), [({"lr": -1.0}, torch.float64), ({}, torch.complex64)]
)
def test_a_group_that_is_refused_is_not_added(
    rule: Build, options: State, dtype: torch.dtype
) -> None:
    optimizer = rule(parameters())
    with pytest.raises((TypeError, ValueError)):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=dtype))]} | options)
    assert len(optimizer.param_groups) == 1
    wrapper = LARSWrapper(AdamW(parameters(), lr=0.1))
    with pytest.raises((TypeError, ValueError)):
        wrapper.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(wrapper.param_groups) == len(wrapper.base.param_groups) == 1
