"""The loop, the kernels and foreach implement the same rule, for random options and tensors."""

import copy
import math
from itertools import chain
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import (
    KINDS,
    LAYOUTS,
    PATHS,
    Build,
    make,
    step_through,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from lars import LAMB, LARS, TVLARS
from lars.names import LAMB_FORMS, LARS_FORMS
from lars.optim.cpu import kernels
from lars.optim.steps.sgd import SGDRule
from lars.optim.steps.trust import trust_ratios


def assert_paths_agree(
    rule: Build, tensors: list[tuple[Tensor, list[Any]]], options: dict[str, Any]
) -> None:
    results = {}
    for path in PATHS:
        params = []
        for weight, _ in tensors:
            # Keep storage and strides, including gaps, which clone() would close.
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
                    nonfinite_as_nan(ours),
                    nonfinite_as_nan(reference),
                    rtol=digits,
                    # Weights of about 1 can cancel to their rounding error.
                    atol=max(digits * largest, 50 * torch.finfo(dtype).eps),
                    equal_nan=True,
                )


def states(optimizer: Optimizer, param: nn.Parameter) -> list[Tensor | None]:
    """The state of a parameter, or nothing if the parameter is nonfinite."""
    names = ("momentum_buffer", "exp_avg", "exp_avg_sq", "step") if param.isfinite().all() else ()
    return [optimizer.state[param].get(name) for name in names]


def nonfinite_as_nan(tensor: Tensor) -> Tensor:
    """Replace inf by nan: which of them appears depends on the order of operations."""
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
    # In half precision, √v has too few digits to compare the quotient m / √v.
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
def test_the_kernels_compute_the_same_ratio(
    weight_norm: float, update_norm: float, clip_to_lr: float | None, **options: Any
) -> None:
    w, u = (torch.tensor([x], dtype=torch.float64) for x in (weight_norm, update_norm))
    buffer = torch.zeros_like(w)
    # With "momentum" the momentum is the penalty, independently of the weight decay.
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
    assert rule.ratio_options().items() >= (options | {"clip_to_lr": clip_to_lr}).items()
    kernels.lars([w.clone()], [u], [buffer], rule)
    live = weight_norm > 0 and update_norm > 0
    decayed = u if options["zero_norm"] == "raw" and not live else u + w
    for lr in (clip_to_lr, None if clip_to_lr is None else torch.tensor(clip_to_lr)):
        ratio = trust_ratios(w, u, clip_to_lr=lr, **options)
        torch.testing.assert_close(buffer, ratio * decayed, equal_nan=True, rtol=1e-6, atol=0)


def test_known_ratio() -> None:
    """The example in the tests of torchlars."""
    w, u = (torch.tensor([x], dtype=torch.float64) for x in (1.234, 5.678))
    ratio = trust_ratios(w, u, coefficient=1e-3, penalty=1e-4, eps=1e-8)
    torch.testing.assert_close(ratio.item(), 0.000217325, rtol=1e-5, atol=0)
