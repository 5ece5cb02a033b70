"""Laws that the optimizers obey whatever the numbers are: identities, paths, policies, layouts."""

import copy
import io
import math
import re
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lars import LAMB, LARS, TVLARS, LARSWrapper
from lars.names import LAMB_FORMS, LARS_FORMS
from lars.optim.cpu import kernels
from lars.optim.steps.sgd import SGDRule
from lars.optim.steps.trust import trust_ratios
from lars.optim.tvlars import time_factor

PATHS = ("loop", "fused", "foreach")
Build = Callable[[list[Any]], Optimizer]
RULES: dict[str, Build] = {
    **{
        f"lars-{form}": lambda params, form=form, **options: LARS(
            params, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "form": form} | options
        )
        for form in LARS_FORMS
    },
    **{
        f"lamb-{form}": lambda params, form=form, **options: LAMB(
            params, **{"lr": 0.1, "weight_decay": 1e-2, "form": form} | options
        )
        for form in LAMB_FORMS
    },
    "tvlars": lambda params, **options: TVLARS(params, **{"lr": 0.1} | options),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
every_path = pytest.mark.parametrize("path", PATHS)


def seeded(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def run(build: Build, start: list[Tensor], grads: list[list[Tensor | None]]) -> list[Tensor]:
    """The parameters after these gradients."""
    params = [nn.Parameter(x.clone(memory_format=torch.preserve_format)) for x in start]
    optimizer = build(params)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else g.clone(memory_format=torch.preserve_format)
        optimizer.step()
    return [p.detach() for p in params]


SHAPES = ((6, 5), (4, 3, 2, 2), (7,), (), (0, 3))
START = seeded(1, *SHAPES)
GRADS: list[list[Tensor | None]] = [list(seeded(2 + k, *SHAPES)) for k in range(5)]

# ------------------------------------------------------------------------------------ identities


@every_path
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "maximize": True},
        {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "maximize": True},
    ],
)
@pytest.mark.parametrize("form", LARS_FORMS)
def test_lars_without_a_ratio_is_sgd(form: str, options: dict[str, Any], path: str) -> None:
    sgd = run(lambda params: SGD(params, lr=0.3, **options), START, GRADS)
    lars = run(
        lambda params: LARS(params, lr=0.3, form=form, adapt=False, path=path, **options),
        START,
        GRADS,
    )
    torch.testing.assert_close(lars, sgd, rtol=1e-12, atol=1e-12)


@every_path
@pytest.mark.parametrize("reference", [Adam, AdamW])
def test_lamb_without_a_ratio_is_adam(reference: type[Optimizer], path: str) -> None:
    options: dict[str, Any] = {"lr": 0.3, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}
    adam = run(lambda params: reference(params, **options), START, GRADS)
    lamb = run(
        lambda params: LAMB(
            params,
            form="paper",
            adapt=False,
            decoupled_weight_decay=reference is AdamW,
            path=path,
            **options,
        ),
        START,
        GRADS,
    )
    torch.testing.assert_close(lamb, adam, rtol=1e-12, atol=1e-12)


def test_lamb_corrects_its_bias_in_float32_as_exactly_as_in_float64() -> None:
    """1 - 0.999 ** 1 computed in float32 is wrong by 5e-5."""
    start, grad = START[0], GRADS[0][0]
    options = {"form": "paper", "adapt": False, "lr": 0.1}
    [exact] = run(lambda params: LAMB(params, **options), [start], [[grad]])
    for path in PATHS:
        [rounded] = run(
            lambda params, path=path: LAMB(params, path=path, **options),
            [torch.zeros(6, 5)],
            [[grad.float()]],
        )
        torch.testing.assert_close(rounded.double(), exact - start, rtol=5e-6, atol=0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_wrapper_around_sgd_is_the_form_torchlars(nesterov: bool) -> None:
    sgd = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov}
    form = run(lambda params: LARS(params, form="torchlars", **sgd), START, GRADS)
    wrapped = run(lambda params: LARSWrapper(SGD(params, **sgd)), START, GRADS)
    torch.testing.assert_close(wrapped, form, rtol=1e-12, atol=0)


def test_larc_is_sgd_at_the_smaller_of_the_two_rates() -> None:
    """Around SGD without momentum the effective rate is min(ratio, lr), per layer."""
    weight, grad = START[0], GRADS[0][0]
    ratio = 0.02 * weight.norm() / (grad.norm() + 1e-8)
    for lr in (0.25 * ratio.item(), 4 * ratio.item()):
        [after] = run(lambda params, lr=lr: LARS(params, form="larc", lr=lr), [weight], [[grad]])
        rate = min(ratio.item(), lr)
        torch.testing.assert_close(after, weight - rate * grad, rtol=1e-12, atol=1e-14)


@every_path
def test_larc_may_start_at_lr_zero(path: str) -> None:
    """The published clip divides by lr: the raw gradient enters the buffer, 100 times too large."""
    weight, grads = START[0], [[g[0]] for g in GRADS]
    params = [nn.Parameter(weight.clone())]
    optimizer = LARS(params, lr=0.0, momentum=0.9, form="larc", path=path)
    moves = []
    for k, [grad] in enumerate(grads):
        before = params[0].detach().clone()
        params[0].grad = grad.clone()
        optimizer.param_groups[0]["lr"] = [0.0, 2.0, 2.0, 2.0, 2.0][k]
        optimizer.step()
        moves.append((params[0].detach() - before).norm().item() / before.norm().item())
    assert moves[0] == 0.0
    # Each gradient moves the weight by min(ratio, lr) * ‖g‖ / ‖w‖ = 0.02, and momentum by ten times
    # that at most. The raw gradient of step 0 would move it by lr * 0.9 = 1.8 in step 1.
    assert all(0 < move < 0.2 for move in moves[1:])


@pytest.mark.parametrize("delay", [0, 3])
def test_tvlars_is_a_lars_whose_coefficient_follows_the_factor(delay: float) -> None:
    options: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1}
    factor = {"lmbda": 0.5, "alpha": 0.7, "delay": delay, "floor": 0.05}
    params = [nn.Parameter(x.clone()) for x in START]
    lars = LARS(params, form="barlowtwins", **options)
    for k, grads in enumerate(GRADS):
        phi = 1 / (0.7 + math.exp(0.5 * (k + 1 - delay))) + 0.05
        lars.param_groups[0]["trust_coefficient"] = 1e-3 * phi
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        lars.step()
    tvlars = run(lambda params: TVLARS(params, max_norm=None, **options, **factor), START, GRADS)
    torch.testing.assert_close(tvlars, [p.detach() for p in params], rtol=1e-12, atol=1e-14)


def test_the_time_factor_overflows_at_no_step_and_ends_at_its_floor() -> None:
    for step in (1e3, 1e5, 1e9, 1e300):
        at_end = time_factor(torch.tensor(step, dtype=torch.float64), lmbda=1.0, floor=0.125)
        assert at_end.item() == 0.125
    early = time_factor(torch.tensor(1.0, dtype=torch.float64), lmbda=1.0, alpha=0.5, delay=1e6)
    assert early.item() == 2.0


@pytest.mark.parametrize("lr", [1, torch.tensor(1.0)])
@every_rule
def test_lr_may_be_an_int_or_a_tensor(rule: Build, lr: Any) -> None:
    plain = run(lambda params: rule(params, lr=1.0), START, GRADS)
    for path in PATHS:
        other = run(lambda params, path=path: rule(params, lr=lr, path=path), START, GRADS)
        torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------- the paths are one rule

KINDS = ("ordinary", "zero weight", "zero grad", "dead", "no grad", "large", "inf", "nan", "tiny")
LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "mixed", "expanded grad")


def make(kind: str, layout: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, list[Any]]:
    """A parameter and three gradients."""
    shape = (4, 3, 2, 2)
    weight, *grads = seeded(seed, *[shape] * 4)
    if kind in ("zero weight", "dead"):
        weight = torch.zeros_like(weight)
    tiny = 1e-4 if dtype == torch.float16 else 1e-7  # ratio * decay must be in float16's range
    scale = {"zero grad": 0.0, "dead": 0.0, "large": 100.0, "tiny": tiny}.get(kind, 1.0)
    grads = [g * scale for g in grads]
    if kind in ("inf", "nan"):
        grads[1][0, 0, 0, 0] = float(kind)
    weight = weight.to(dtype)
    typed: list[Any] = [g.to(dtype) for g in grads]
    if layout in ("channels_last", "mixed"):
        weight = weight.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last":
        typed = [g.contiguous(memory_format=torch.channels_last) for g in typed]
    if layout == "transposed":
        weight = weight.transpose(0, 3).contiguous().transpose(0, 3)
        typed = [g.transpose(0, 3).contiguous().transpose(0, 3) for g in typed]
    if layout == "strided":
        weight = torch.stack([weight, weight], dim=-1)[..., 0]
    if layout == "expanded grad":
        typed = [g[:1].expand(shape) for g in typed]
    if kind == "no grad":
        typed = [None] * 3
    return weight, typed


def step_through(optimizer: Optimizer, params: list[nn.Parameter], grads: list[list[Any]]) -> None:
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g
        optimizer.step()


def assert_paths_agree(
    rule: Build, tensors: list[tuple[Tensor, list[Any]]], options: dict[str, Any]
) -> None:
    results = {}
    for path in PATHS:
        params = []
        for weight, _ in tensors:
            # Storage and strides are kept, also those with gaps, which clone() would close.
            kept = weight.new_empty(weight.untyped_storage().nbytes() // weight.element_size())
            kept = kept.as_strided(weight.shape, weight.stride())
            params.append(nn.Parameter(kept.copy_(weight)))
        optimizer = rule(params, path=path, **options)
        grads = [list(step) for step in zip(*(g for _, g in tensors), strict=True)]
        before = copy.deepcopy(grads)
        step_through(optimizer, params, grads)
        for after, g in zip(chain(*grads), chain(*before), strict=True):
            assert g is None or torch.equal(after.nan_to_num(), g.nan_to_num()), "p.grad changed"
        results[path] = [value for p in params for value in (p.detach(), *states(optimizer, p))]
    dtype = tensors[0][0].dtype
    digits = {torch.float64: 1e-9, torch.float32: 2e-4}.get(dtype, 5e-2)
    for path in ("fused", "foreach"):
        for ours, reference in zip(results[path], results["loop"], strict=True):
            assert (ours is None) == (reference is None)
            if reference is not None and reference.numel():
                largest = reference.nan_to_num(0, 0, 0).abs().max().item()
                torch.testing.assert_close(
                    broken_as_nan(ours),
                    broken_as_nan(reference),
                    rtol=digits,
                    # Weights of size 1 may cancel to their rounding error.
                    atol=max(digits * largest, 50 * torch.finfo(dtype).eps),
                    equal_nan=True,
                )


def states(optimizer: Optimizer, param: nn.Parameter) -> list[Tensor | None]:
    """What is kept for a parameter; of one that is broken for good, what it is does not matter."""
    names = ("momentum_buffer", "exp_avg", "exp_avg_sq", "step") if param.isfinite().all() else ()
    return [optimizer.state[param].get(name) for name in names]


def broken_as_nan(tensor: Tensor) -> Tensor:
    """Whether a broken element is inf or nan depends on the order of operations."""
    return torch.where(tensor.isfinite(), tensor, math.nan)


optional = st.sampled_from
TENSORS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.sampled_from(LAYOUTS), st.integers(0, 2**16)),
    min_size=1,
    max_size=4,
)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=80, deadline=None)
@given(
    tensors=TENSORS,
    dtype=DTYPES,
    form=st.sampled_from(list(LARS_FORMS)),
    inside=optional([None, "none", "ratio", "both"]),
    denominator=optional([None, "split", "joint", "momentum"]),
    max_ratio=optional(["form", None, 0.5]),
    max_element=optional(["form", None, 0.5]),
    trust_clip=optional([None, True]),
    zero_norm=optional([None, "one", "raw", "formula"]),
    momentum=optional([0.0, 0.9]),
    weight_decay=optional([0.0, 1e-2, 1.0]),
    lr=optional([0.0, 1e-3, 1.0]),
    nesterov=st.booleans(),
    maximize=st.booleans(),
    adapt=st.booleans(),
    nonfinite=optional(["propagate", "skip"]),
)
def test_the_paths_of_lars_agree(
    tensors: list[Any], dtype: torch.dtype, nesterov: bool, **options: Any
) -> None:
    made = [make(kind, layout, dtype, seed) for kind, layout, seed in tensors]
    options["nesterov"] = nesterov and options["momentum"] > 0
    assert_paths_agree(LARS, made, options)


@settings(max_examples=60, deadline=None)
@given(
    tensors=TENSORS,
    dtype=DTYPES,
    form=st.sampled_from(list(LAMB_FORMS)),
    betas=optional([(0.9, 0.999), (0.0, 0.5)]),
    eps=optional([1e-6, 1e-2]),
    max_ratio=optional(["form", None, 0.5]),
    weight_decay=optional([0.0, 1e-2, 1.0]),
    decoupled_weight_decay=st.booleans(),
    lr=optional([0.0, 1e-2]),
    adapt=st.booleans(),
    nonfinite=optional(["propagate", "skip"]),
)
def test_the_paths_of_lamb_agree(tensors: list[Any], dtype: torch.dtype, **options: Any) -> None:
    # √v of half precision has too few digits for the quotient m / √v to be compared.
    dtype = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    made = [make(kind, layout, dtype, seed) for kind, layout, seed in tensors]
    assert_paths_agree(LAMB, made, options)


@settings(max_examples=30, deadline=None)
@given(
    tensors=TENSORS,
    dtype=DTYPES,
    lmbda=optional([0.0, 1e-3, 100.0]),
    delay=optional([0.0, 2.0]),
    floor=optional([0.0, 0.5]),
    max_norm=optional([None, 1.0, 10.0]),
    momentum=optional([0.0, 0.9]),
    weight_decay=optional([0.0, 1.0]),
    adapt=st.booleans(),
    nonfinite=optional(["propagate", "skip"]),
)
def test_the_paths_of_tvlars_agree(tensors: list[Any], dtype: torch.dtype, **options: Any) -> None:
    made = [make(kind, layout, dtype, seed) for kind, layout, seed in tensors]
    assert_paths_agree(TVLARS, made, options)


NORMS = st.one_of(st.sampled_from([0.0, math.inf, math.nan]), st.floats(1e-20, 1e20))


@settings(max_examples=150, deadline=None)
@given(
    weight_norm=st.one_of(st.just(0.0), st.floats(1e-20, 1e20)),
    update_norm=NORMS,
    coefficient=st.floats(1e-4, 10),
    penalty=optional([0.0, 1e-4, 0.9]),
    eps=optional([0.0, 1e-8]),
    max_norm=optional([None, 10.0]),
    max_ratio=optional([None, 50.0]),
    clip_to_lr=optional([None, 0.0, 0.1]),
    zero_norm=optional(["one", "raw", "formula"]),
)
def test_the_ratio_of_the_kernels_is_the_ratio_on_the_device(
    weight_norm: float, update_norm: float, clip_to_lr: float | None, **options: Any
) -> None:
    w, u = (torch.tensor([x], dtype=torch.float64) for x in (weight_norm, update_norm))
    buffer = torch.zeros_like(w)
    # "momentum" makes the momentum the penalty, so that it does not depend on the weight decay.
    rule = SGDRule(
        lr=1.0 if clip_to_lr is None else clip_to_lr,
        momentum=options["penalty"],
        weight_decay=1.0,
        trust_coefficient=options["coefficient"],
        eps=options["eps"],
        inside="ratio",
        denominator="momentum",
        max_ratio=options["max_ratio"],
        max_norm=options["max_norm"],
        trust_clip=clip_to_lr is not None,
        zero_norm=options["zero_norm"],
    )
    assert rule.ratio_options() == options | {"clip_to_lr": clip_to_lr}
    kernels.lars([w.clone()], [u], [buffer], rule)
    live = weight_norm > 0 and update_norm > 0
    decayed = u if options["zero_norm"] == "raw" and not live else u + w
    for lr in (clip_to_lr, None if clip_to_lr is None else torch.tensor(clip_to_lr)):
        ratio = trust_ratios(w, u, clip_to_lr=lr, **options)
        torch.testing.assert_close(buffer, ratio * decayed, equal_nan=True, rtol=1e-6, atol=0)


def test_known_ratio() -> None:
    """The one case that torchlars' own tests spell out."""
    w, u = (torch.tensor([x], dtype=torch.float64) for x in (1.234, 5.678))
    ratio = trust_ratios(w, u, coefficient=1e-3, penalty=1e-4, eps=1e-8)
    torch.testing.assert_close(ratio.item(), 0.000217325, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------- zero norms


@every_path
@pytest.mark.parametrize("form", ["nus", "mlperf", "torchlars", "optax", "barlowtwins"])
def test_a_zero_weight_moves_by_plain_sgd(form: str, path: str) -> None:
    """Ratio 1. With a ratio of 0 a layer that is initialised to zero would never train."""
    grad = GRADS[0][0]
    [after] = run(
        lambda p: LARS(p, lr=0.5, momentum=0.9, form=form, path=path),
        [torch.zeros_like(grad)],
        [[grad]],
    )
    torch.testing.assert_close(after, -0.5 * grad, rtol=1e-12, atol=0)


@every_rule
@every_path
def test_zero_weights_with_zero_gradients_stay_zero(rule: Build, path: str) -> None:
    zero = torch.zeros(3, 2)
    [after] = run(lambda params: rule(params, path=path), [zero], [[zero]] * 3)
    assert torch.equal(after, zero)


@every_path
def test_zero_gradient_decays_the_weight_but_not_in_larc(path: str) -> None:
    weight, zero = START[0], torch.zeros_like(START[0])
    options = {"lr": 0.5, "weight_decay": 0.1, "path": path}
    [nus] = run(lambda p: LARS(p, form="nus", **options), [weight], [[zero]])
    [larc] = run(lambda p: LARS(p, form="larc", **options), [weight], [[zero]])
    torch.testing.assert_close(nus, 0.95 * weight, rtol=1e-12, atol=0)
    assert torch.equal(larc, weight)


# ------------------------------------------------------------------------------- broken gradients


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every_rule
@every_path
def test_a_broken_gradient_makes_the_whole_tensor_nan(rule: Build, path: str, value: float) -> None:
    """Loud: the next loss is nan. In the published NUS code the ratio silently becomes 1."""
    grad = GRADS[0][0].clone()
    grad[0, 0] = value
    sound = START[0]
    params = [nn.Parameter(sound.clone()), nn.Parameter(sound.clone())]
    # LAMB's forms with a common norm of all gradients spread it to all tensors; adapt or not.
    optimizer = rule(params, path=path)
    for p, g in zip(params, (grad, GRADS[0][0]), strict=True):
        p.grad = g.clone()
    optimizer.step()
    assert params[0].isnan().all()
    shared = optimizer.param_groups[0].get("max_grad_norm") is not None
    assert params[1].isnan().all() if shared else params[1].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("adapt", [True, False])
@every_rule
@every_path
def test_a_broken_gradient_is_skipped_on_demand(
    rule: Build, path: str, adapt: bool, value: float
) -> None:
    """Skipped means: as if that tensor had had no gradient in that step."""
    broken = GRADS[1][0].clone()
    broken[0, 0] = value
    start, grads = START[:2], [g[:2] for g in GRADS]
    shared = isinstance(rule([nn.Parameter(START[0])]), LAMB)
    with_broken = [
        [broken if k == 1 and i == 0 else g for i, g in enumerate(step)]
        for k, step in enumerate(grads)
    ]
    options = {"path": path, "adapt": adapt, "nonfinite": "skip"}
    if shared:
        options["max_grad_norm"] = None
    without = [
        [None if k == 1 and i == 0 else g for i, g in enumerate(step)]
        for k, step in enumerate(grads)
    ]
    got = run(lambda p: rule(p, **options), start, with_broken)
    want = run(lambda p: rule(p, **options), start, without)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@every_path
def test_a_broken_common_norm_skips_the_whole_step(path: str) -> None:
    broken = GRADS[1][0].clone()
    broken[0, 0] = math.inf
    start = START[:2]
    step = [broken, GRADS[1][1]]
    got = run(lambda p: LAMB(p, form="nus", nonfinite="skip", path=path), start, [step])
    assert all(torch.equal(a, b) for a, b in zip(got, start, strict=True))


@every_path
def test_the_element_clamp_does_not_hide_an_infinite_gradient_without_ratio(path: str) -> None:
    grad = GRADS[0][0].clone()
    grad[0, 0] = math.inf
    [after] = run(lambda p: LARS(p, adapt=False, path=path), [START[0]], [[grad]])
    assert after.isnan().all()


# ------------------------------------------------------------------------------------------ bounds


@every_path
@pytest.mark.parametrize("adapt", [True, False])
def test_the_element_clamp_acts_on_the_decayed_gradient(path: str, adapt: bool) -> None:
    weight = torch.tensor([[30.0, -1.0]], dtype=torch.float64)
    grad = torch.tensor([[5.0, -25.0]], dtype=torch.float64)  # decayed: 8, -25.1
    [after] = run(
        lambda p: LARS(p, lr=1.0, weight_decay=0.1, adapt=adapt, path=path), [weight], [[grad]]
    )
    norm = weight.norm()
    ratio = 1e-3 * norm / (grad.norm() + 0.1 * norm) if adapt else 1.0
    clamped = torch.tensor([[8.0, -10.0]], dtype=torch.float64)
    torch.testing.assert_close(after, weight - ratio * clamped, rtol=1e-12, atol=0)


@every_path
@pytest.mark.parametrize("adapt", [True, False])
def test_the_decay_alone_may_reach_the_element_clamp(path: str, adapt: bool) -> None:
    weight = torch.full((2, 2), 150.0, dtype=torch.float64)
    grad = torch.full_like(weight, 1e-3)
    [after] = run(
        lambda p: LARS(p, lr=1.0, weight_decay=0.1, adapt=adapt, path=path), [weight], [[grad]]
    )
    ratio = 1e-3 * 300.0 / (grad.norm() + 30.0) if adapt else 1.0
    torch.testing.assert_close(after, weight - ratio * 10.0, rtol=1e-12, atol=0)


@every_path
def test_the_joint_norm_survives_a_gradient_that_cancels_the_decay(path: str) -> None:
    weight, small = START[0], 1e-7 * GRADS[0][0]
    options = {"form": "optax", "weight_decay": 0.1, "path": path}
    for sign in (-1, 1):
        grad = sign * (-0.1 * weight + small)
        [after] = run(
            lambda p, s=sign: LARS(p, lr=1.0, maximize=s < 0, **options), [weight], [[grad]]
        )
        step = 1e-3 * weight.norm() / small.norm() * small
        torch.testing.assert_close(after - weight, -step, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("largest", [9.0, 9.99, 10.0, 10.01, 11.0])
def test_the_fused_path_clamps_exactly_where_the_loop_does(largest: float) -> None:
    grad = torch.full((50, 50), 1e-3, dtype=torch.float64)
    grad[3, 4], grad[5, 6] = largest, -largest
    weight = torch.ones_like(grad)
    loop, fused = (
        run(lambda p, path=path: LARS(p, lr=1.0, path=path), [weight], [[grad]])
        for path in ("loop", "fused")
    )
    torch.testing.assert_close(fused, loop, rtol=1e-13, atol=0)


# ------------------------------------------------------------------------------------------ layouts


@every_rule
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_the_update(rule: Build, layout: str) -> None:
    """The fused kernels on the CPU ignore strides: what they cannot walk, the loop takes."""
    weight, grads = make("ordinary", layout, torch.float64, seed=7)
    plain = run(rule, [weight.contiguous()], [[g.contiguous()] for g in grads])
    params = [nn.Parameter(weight)]
    step_through(rule(params), params, [[g] for g in grads])
    torch.testing.assert_close(params[0].detach(), plain[0], rtol=1e-12, atol=1e-14)


def test_the_kernel_itself_is_wrong_on_mixed_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the guard is needed, and sees it."""
    weight, [grad, *_] = make("ordinary", "mixed", torch.float64, seed=7)
    assert not kernels.takes(weight, grad)
    [right] = run(lambda p: LARS(p, path="fused"), [weight], [[grad]])
    monkeypatch.setattr(kernels, "takes", lambda *_: True)
    [wrong] = run(lambda p: LARS(p, path="fused"), [weight], [[grad]])
    assert not torch.allclose(wrong, right, atol=1e-6)


def test_the_guard_takes_what_is_dense_and_nothing_else() -> None:
    x = torch.zeros(4, 3, 2, 2)
    assert kernels.takes(x, x.clone())
    nhwc = x.contiguous(memory_format=torch.channels_last)
    assert kernels.takes(nhwc, nhwc.clone(memory_format=torch.preserve_format))
    assert kernels.takes(x.transpose(0, 2), x.clone().transpose(0, 2))
    assert kernels.takes(torch.tensor(1.0), torch.tensor(1.0))
    assert kernels.takes(torch.zeros(0, 3), torch.zeros(0, 3))
    column = torch.zeros(4, 3, 1, 1)  # strides say less here than they seem to
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
def test_a_negated_view_is_taken_for_what_it_is(build: Build) -> None:
    weight, grad = START[0], GRADS[0][0]
    [plain] = run(build, [weight], [[-grad]])
    param = nn.Parameter(weight.clone())
    param.grad = torch._neg_view(grad.clone())
    build([param]).step()
    torch.testing.assert_close(param.detach(), plain, rtol=1e-12, atol=0)


def test_gradients_may_be_views_of_one_flat_buffer() -> None:
    """As the distributed engine keeps them: each view with its parameter's own strides."""
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


# ------------------------------------------------------------------------- as torch optimizers go


@every_rule
def test_a_saved_and_loaded_run_continues_bit_for_bit(rule: Build) -> None:
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
def test_a_copied_optimizer_continues_bit_for_bit(rule: Build) -> None:
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
def test_rebuilt_from_its_groups_it_is_the_same_optimizer(rule: Build) -> None:
    """What Horovod's wrapper does: the class, called with the groups and nothing else."""
    special = {"lr": 0.7, "weight_decay": 0.3, "nonfinite": "skip", "path": "loop", "adapt": False}
    params = [nn.Parameter(x.clone()) for x in START]
    original = rule(params, **special)
    step_through(original, params, GRADS[:2])
    groups = [dict(group) for group in original.param_groups]
    rebuilt = type(original)([dict(group) for group in groups])
    assert rebuilt.param_groups == groups  # the step count of TVLARS included
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
    if not isinstance(optimizer, LAMB):  # whose forms may share a gradient norm
        alone = run(rule, START[:1], [g[:1] for g in GRADS[:3]])
        torch.testing.assert_close(params[0].detach(), alone[0], rtol=1e-12, atol=0)


@every_rule
def test_many_groups_are_one_group_cut_up(rule: Build) -> None:
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
def test_the_closure_runs_with_gradients_and_its_loss_comes_back(rule: Build) -> None:
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


def test_the_presets_of_lars_are_these() -> None:
    """Everything that a form sets, once more, as the documentation gives it."""
    names = ("inside", "denominator", "trust_coefficient", "eps", "max_ratio", "max_element",
             "trust_clip", "zero_norm")  # fmt: skip
    expected = {
        "nus": ("none", "split", 1e-3, 0.0, 50.0, 10.0, False, "one"),
        "mlperf": ("both", "split", 1e-3, 0.0, None, None, False, "one"),
        "optax": ("both", "joint", 1e-3, 0.0, None, None, False, "one"),
        "torchlars": ("ratio", "split", 1e-3, 1e-8, None, None, False, "one"),
        "barlowtwins": ("ratio", "joint", 1e-3, 0.0, None, None, False, "one"),
        "larc": ("ratio", "split", 0.02, 1e-8, None, None, True, "raw"),
        "cmpark": ("none", "momentum", 1.0, 0.0, None, None, False, "formula"),
        "cmpark-inside": ("both", "momentum", 1.0, 0.0, None, None, False, "formula"),
    }
    assert expected.keys() == LARS_FORMS.keys()
    for form, values in expected.items():
        [group] = LARS([nn.Parameter(torch.zeros(2))], form=form).param_groups
        assert tuple(group[name] for name in names) == values, form


def test_the_presets_of_lamb_are_these() -> None:
    names = ("bias_correction", "max_grad_norm", "max_weight_norm", "always_adapt", "max_ratio")
    expected = {
        "nus": (False, 1.0, None, False, None),
        "paper": (True, None, None, True, None),
        "tvlars": (False, None, 10.0, True, None),
        "apex": (True, 1.0, None, False, None),
        "lambc": (True, None, None, True, 1.0),
    }
    assert expected.keys() == LAMB_FORMS.keys()
    for form, values in expected.items():
        [group] = LAMB([nn.Parameter(torch.zeros(2))], form=form).param_groups
        assert tuple(group[name] for name in names) == values, form


def test_options_beside_a_form_take_precedence_and_none_takes_a_bound_away() -> None:
    params = [nn.Parameter(torch.zeros(2))]
    [group] = LARS(params, form="nus", max_ratio=None, max_element=3.0, eps=0.1).param_groups
    assert (group["max_ratio"], group["max_element"], group["eps"]) == (None, 3.0, 0.1)
    [group] = LAMB(params, form="nus", max_grad_norm=None, bias_correction=True).param_groups
    assert (group["max_grad_norm"], group["bias_correction"]) == (None, True)


def test_a_group_may_name_its_own_form() -> None:
    first, second = (nn.Parameter(START[0].clone()) for _ in range(2))
    groups = [{"params": [first]}, {"params": [second], "form": "larc", "eps": 0.5}]
    optimizer = LARS(groups, lr=0.1)
    assert optimizer.param_groups[0]["max_ratio"] == 50.0
    assert optimizer.param_groups[1].items() >= {"max_ratio": None, "trust_clip": True}.items()
    assert optimizer.param_groups[1]["eps"] == 0.5


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (LARS, {"form": "lard"}, "form='lard' is not known; choose one of: nus, mlperf"),
        (LARS, {"lr": -1.0}, "lr=-1.0 must be finite and 0 or more"),
        (LARS, {"lr": math.inf}, "lr=inf must be finite and 0 or more"),
        (LARS, {"lr": math.nan}, "lr=nan must be finite and 0 or more"),
        (LARS, {"momentum": -0.1}, "momentum=-0.1 must be finite and 0 or more"),
        (LARS, {"weight_decay": -0.1}, "weight_decay=-0.1 must be finite and 0 or more"),
        (LARS, {"trust_coefficient": -1}, "trust_coefficient=-1 must be finite and 0 or more"),
        (LARS, {"eps": -1e-8}, "eps=-1e-08 must be finite and 0 or more"),
        (LARS, {"max_ratio": 0.0}, "max_ratio=0.0 must be more than 0, or None for no bound"),
        (LARS, {"max_element": -3}, "max_element=-3 must be more than 0, or None for no bound"),
        (LARS, {"inside": "lr"}, "inside='lr' is not known; choose one of: none, ratio, both"),
        (LARS, {"nonfinite": "ignore"}, "nonfinite='ignore' is not known"),
        (LARS, {"nesterov": True}, "nesterov=True needs a momentum above 0"),
        (LAMB, {"form": "bert"}, "form='bert' is not known; choose one of: nus, paper"),
        (LAMB, {"betas": (0.9, 1.0)}, "betas=(0.9, 1.0) must be two numbers in [0, 1)"),
        (LAMB, {"max_grad_norm": -1.0}, "max_grad_norm=-1.0 must be more than 0"),
        (TVLARS, {"lmbda": -1.0}, "lmbda=-1.0 must be finite and 0 or more"),
        (TVLARS, {"lmbda": math.inf}, "lmbda=inf must be finite and 0 or more"),
        (TVLARS, {"floor": -0.1}, "floor=-0.1 must be finite and 0 or more"),
        (TVLARS, {"max_norm": 0.0}, "max_norm=0.0 must be more than 0, or None for no bound"),
        (TVLARS, {"alpha": 0.0}, "alpha=0.0 must be finite and more than 0"),
        (TVLARS, {"alpha": math.inf}, "alpha=inf must be finite and more than 0"),
        (TVLARS, {"delay": math.nan}, "delay=nan must be a finite number of steps"),
        (TVLARS, {"path": "gpu"}, "path='gpu' is not known"),
    ],
)
def test_bad_values_are_refused_by_name(
    build: Callable[..., Optimizer], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build([nn.Parameter(torch.zeros(2))], **options)


TWO = torch.tensor([0.1, 0.2])


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (LARS, {"lr": "0.1"}, "lr='0.1' must be a number"),
        (LARS, {"lr": None}, "lr=None must be a number"),
        (LARS, {"lr": TWO}, "lr must be a number or a 0-dim tensor, not of shape (2,)"),
        (LARS, {"lr": TWO[:1]}, "lr must be a number or a 0-dim tensor, not of shape (1,)"),
        (LARS, {"max_ratio": "50"}, "max_ratio='50' must be a number"),
        (LAMB, {"weight_decay": None}, "weight_decay=None must be a number"),
        (LAMB, {"betas": 0.9}, "betas=0.9 must be two numbers in [0, 1)"),
        (LAMB, {"betas": ("a", "b")}, "betas='a' must be a number"),
        (TVLARS, {"alpha": None}, "alpha=None must be a number"),
        (TVLARS, {"delay": None}, "delay=None must be a number"),
        (lambda p, **wrong: LARSWrapper(SGD(p), **wrong), {"eps": "x"}, "eps='x' must be a number"),
    ],
)
def test_what_is_no_number_is_refused_by_name(
    build: Callable[..., Optimizer], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        build([nn.Parameter(torch.zeros(2))], **options)


@pytest.mark.parametrize("build", [LARS, TVLARS])
def test_a_plain_state_without_a_buffer_can_be_gone_on_from(
    build: Callable[..., Optimizer],
) -> None:
    param = nn.Parameter(START[0].clone())
    optimizer = build([param], momentum=0.9)
    state = optimizer.state_dict() | {"state": {0: {"momentum_buffer": None}}}
    optimizer.load_state_dict(state)  # what torch's SGD had at momentum 0, in some of its versions
    param.grad = GRADS[0][0]
    optimizer.step()
    assert optimizer.state[param]["momentum_buffer"].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_steps_that_were_saved_as_plain_numbers_are_counted_on(path: str) -> None:
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", ["loop", "fused", "foreach"])
@pytest.mark.parametrize("build", [LARS, LAMB, TVLARS])
def test_a_half_precision_number_is_a_parameter_too(
    build: Callable[..., Optimizer], path: str, dtype: torch.dtype
) -> None:
    number = torch.nn.Parameter(torch.ones((), dtype=dtype))
    number.grad = torch.full_like(number, 3.0)
    build([number], lr=100.0, weight_decay=0.1, path=path).step()
    assert number.isfinite()
    assert number != 1


@pytest.mark.parametrize("nesterov", [False, True])
@every_path
def test_a_ratio_may_be_beyond_the_range_of_half_precision(path: str, nesterov: bool) -> None:
    weight = torch.full((16,), 100.0, dtype=torch.float16)
    grad = torch.full_like(weight, 6e-8)
    [after] = run(
        lambda p: LARS(
            p, 1.0, 0.5, trust_coefficient=0.1, form="torchlars", nesterov=nesterov, path=path
        ),
        [weight],
        [[grad]],
    )
    step = 0.1 * weight.float().norm() / (grad.float().norm() + 1e-8) * grad.float()
    want = weight - step * (1.5 if nesterov else 1.0)
    torch.testing.assert_close(after.float(), want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("path", ["loop", "fused", "foreach"])
def test_a_formula_is_bounded_like_any_other_ratio(path: str) -> None:
    weight, grad = torch.ones(4, dtype=torch.float64), torch.full((4,), 0.5, dtype=torch.float64)
    [after] = run(
        lambda p: LARS(p, lr=1.0, form="cmpark", max_ratio=0.01, path=path), [weight], [[grad]]
    )
    torch.testing.assert_close(after, weight - 0.01 * grad)


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
