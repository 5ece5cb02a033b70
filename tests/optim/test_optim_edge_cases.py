"""Zero norms, nonfinite gradients, bounds and half precision."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import (
    GRADS,
    START,
    Build,
    every_path,
    every_rule,
    run,
)
from torch import nn
from torch.optim import Optimizer

from lars import LAMB, LARS, TVLARS, LARSWrapper

# ------------------------------------------------------------------------------------- zero norms


@every_path
@pytest.mark.parametrize("form", ["nus", "mlperf", "torchlars", "optax", "barlowtwins"])
def test_a_zero_weight_moves_by_plain_sgd(form: str, path: str) -> None:
    """The ratio is 1. With ratio 0, a layer that is initialised to zero would never train."""
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
def test_a_zero_gradient_decays_the_weight_except_in_larc(path: str) -> None:
    weight, zero = START[0], torch.zeros_like(START[0])
    options = {"lr": 0.5, "weight_decay": 0.1, "path": path}
    [nus] = run(lambda p: LARS(p, form="nus", **options), [weight], [[zero]])
    [larc] = run(lambda p: LARS(p, form="larc", **options), [weight], [[zero]])
    torch.testing.assert_close(nus, 0.95 * weight, rtol=1e-12, atol=0)
    assert torch.equal(larc, weight)


# ------------------------------------------------------------------------------- nonfinite gradients


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every_rule
@every_path
def test_a_nonfinite_gradient_makes_the_whole_tensor_nan(
    rule: Build, path: str, value: float
) -> None:
    """Then the next loss is nan. In the published NUS code the ratio silently becomes 1."""
    grad = GRADS[0][0].clone()
    grad[0, 0] = value
    sound = START[0]
    params = [nn.Parameter(sound.clone()), nn.Parameter(sound.clone())]
    # The forms of LAMB with a global norm make all tensors nan, with or without a trust ratio.
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
def test_a_nonfinite_gradient_can_be_skipped(
    rule: Build, path: str, adapt: bool, value: float
) -> None:
    """The result is the same as if the tensor had no gradient in that step."""
    nonfinite = GRADS[1][0].clone()
    nonfinite[0, 0] = value
    start, grads = START[:2], [g[:2] for g in GRADS]
    shared = isinstance(rule([nn.Parameter(START[0])]), LAMB)
    with_nonfinite = [
        [nonfinite if k == 1 and i == 0 else g for i, g in enumerate(step)]
        for k, step in enumerate(grads)
    ]
    options = {"path": path, "adapt": adapt, "nonfinite": "skip"}
    if shared:
        options["max_grad_norm"] = None
    without = [
        [None if k == 1 and i == 0 else g for i, g in enumerate(step)]
        for k, step in enumerate(grads)
    ]
    got = run(lambda p: rule(p, **options), start, with_nonfinite)
    want = run(lambda p: rule(p, **options), start, without)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@every_path
def test_a_nonfinite_global_norm_skips_the_whole_step(path: str) -> None:
    nonfinite = GRADS[1][0].clone()
    nonfinite[0, 0] = math.inf
    start = START[:2]
    step = [nonfinite, GRADS[1][1]]
    got = run(lambda p: LAMB(p, form="nus", nonfinite="skip", path=path), start, [step])
    assert all(torch.equal(a, b) for a, b in zip(got, start, strict=True))


@every_path
def test_the_element_clamp_does_not_hide_an_infinite_gradient(path: str) -> None:
    grad = GRADS[0][0].clone()
    grad[0, 0] = math.inf
    [after] = run(lambda p: LARS(p, adapt=False, path=path), [START[0]], [[grad]])
    assert after.isnan().all()


# ------------------------------------------------------------------------------------------ bounds


@every_path
@pytest.mark.parametrize("adapt", [True, False])
def test_the_element_clamp_acts_on_the_decayed_gradient(path: str, adapt: bool) -> None:
    weight = torch.tensor([[30.0, -1.0]], dtype=torch.float64)
    grad = torch.tensor([[5.0, -25.0]], dtype=torch.float64)  # with weight decay: 8, -25.1
    [after] = run(
        lambda p: LARS(p, lr=1.0, weight_decay=0.1, adapt=adapt, path=path), [weight], [[grad]]
    )
    norm = weight.norm()
    ratio = 1e-3 * norm / (grad.norm() + 0.1 * norm) if adapt else 1.0
    clamped = torch.tensor([[8.0, -10.0]], dtype=torch.float64)
    torch.testing.assert_close(after, weight - ratio * clamped, rtol=1e-12, atol=0)


@every_path
@pytest.mark.parametrize("adapt", [True, False])
def test_the_weight_decay_alone_can_reach_the_element_clamp(path: str, adapt: bool) -> None:
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", ["loop", "fused", "foreach"])
@pytest.mark.parametrize("build", [LARS, LAMB, TVLARS])
def test_a_half_precision_scalar_can_be_a_parameter(
    build: Callable[..., Optimizer], path: str, dtype: torch.dtype
) -> None:
    number = torch.nn.Parameter(torch.ones((), dtype=dtype))
    number.grad = torch.full_like(number, 3.0)
    build([number], lr=100.0, weight_decay=0.1, path=path).step()
    assert number.isfinite()
    assert number != 1


@pytest.mark.parametrize("nesterov", [False, True])
@every_path
def test_a_ratio_may_exceed_the_range_of_half_precision(path: str, nesterov: bool) -> None:
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
def test_max_ratio_also_bounds_zero_norm_formula(path: str) -> None:
    weight, grad = torch.ones(4, dtype=torch.float64), torch.full((4,), 0.5, dtype=torch.float64)
    [after] = run(
        lambda p: LARS(p, lr=1.0, form="cmpark", max_ratio=0.01, path=path), [weight], [[grad]]
    )
    torch.testing.assert_close(after, weight - 0.01 * grad)


# ------------------------------------------------------------------------ large and small gradients


@every_rule
@every_path
@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e22, 1e30])
def test_norms_do_not_overflow_or_vanish_in_float32(rule: Build, path: str, scale: float) -> None:
    """All paths compute them in float64, as the kernels do; squares of 1e22 exceed float32."""
    start = [x.float() for x in START[:2]]
    grads: list[list[Any]] = [[(scale * g).float() for g in step[:2]] for step in GRADS[:2]]
    got = run(lambda p: rule(p, path=path), start, grads)
    assert all(x.isfinite().all() for x in got)
    optimizer = rule([nn.Parameter(START[0])])
    if isinstance(optimizer, LAMB) and scale > 1 and not optimizer.defaults["max_grad_norm"]:
        want = run(lambda p: rule(p, path="loop"), start, grads)  # squares of elements overflow
    else:
        wide = [[g.double() for g in step] for step in grads]
        want = [
            x.float()
            for x in run(lambda p: rule(p, path="loop"), [x.double() for x in start], wide)
        ]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6 * y.abs().max().item())


@every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_large_gradient_is_not_mistaken_for_a_nonfinite_one(
    path: str, dtype: torch.dtype
) -> None:
    weight, grad = torch.ones(4, dtype=dtype), torch.full((4,), 1e22, dtype=dtype)
    for options in ({"adapt": False}, {"form": "mlperf"}):
        [after] = run(
            lambda p, o=options: LARS(p, lr=50.0, nonfinite="skip", path=path, **o),
            [weight],
            [[grad]],
        )
        assert not torch.equal(after, weight)


@pytest.mark.parametrize("scale", [1e-25, 1e22])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_the_wrapper_computes_norms_in_float64(
    base: Callable[..., Optimizer], scale: float
) -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        weight = nn.Parameter(START[0].to(dtype))
        weight.grad = scale * GRADS[0][0].to(dtype)
        LARSWrapper(base([weight], lr=0.5, weight_decay=0.1), eps=0.0).step()
        results.append(weight.detach().float())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
