"""Time and memory traffic of optimizer steps on the parameters of ResNet-50, beside torch's fused ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from lars.comm.world import World
from lars.models import build
from lars.optim import create_optimizer
from launch.acceptance import training
from launch.acceptance.budget import Budget
from launch.acceptance.rows import OK, SLOW, Row, measured, not_tested

# Steps that use less than this share of the bandwidth of a copy are slow.
_LEAST_SHARE = 0.25
_CALLS = 10  # steps between two waits for the device


class Candidate(NamedTuple):
    """An optimizer, and how often its rule must read or write a tensor of the size of the parameters.

    SGD with momentum reads w, g, m and writes w, m. LARS and TVLARS read w and g once more for their norms. AdamW reads
    w, g, m, v and writes w, m, v. LAMB keeps its update between the norms and the weights: it writes and reads it.
    """

    what: str
    name: str
    accesses: int
    options: dict[str, Any]


CANDIDATES = (
    Candidate("torch's fused SGD", "sgd", 5, {"fused": True}),
    Candidate("LARS", "lars", 7, {}),
    Candidate("TVLARS", "tvlars", 7, {}),
    Candidate("torch's fused AdamW", "adamw", 7, {"fused": True}),
    Candidate("LAMB", "lamb", 10, {}),
)


def run(budget: Budget) -> Iterator[Row]:
    """Measure a copy, then each optimizer."""
    device = training.device_of(World())
    each = budget.left() / (len(CANDIDATES) + 2)
    bandwidth = copy_bandwidth(device, min(each, 3.0))
    yield measured("copy within the memory", bandwidth, "GB/s", note="bytes read and written")
    model = build("resnet50", 1000).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for candidate in CANDIDATES:
        if budget.left() < 1:
            yield not_tested(candidate.what, "the time is used up; --minutes")
            continue
        seconds = step_seconds(candidate, model, device, min(each, 5.0))
        moved = candidate.accesses * size
        rate = moved / seconds / 1e9
        note = f"at least {moved / 1e6:.0f} MB: {rate:.1f} GB/s, {rate / bandwidth:.0%} of a copy's"
        what = f"{candidate.what}, step of ResNet-50"
        verdict = SLOW if rate < _LEAST_SHARE * bandwidth else OK
        yield Row(what, verdict, 1000 * seconds, "ms", note=note)


def step_seconds(
    candidate: Candidate, model: nn.Module, device: torch.device, seconds: float
) -> float:
    """Median time of a step of an optimizer."""
    optimizer = create_optimizer(
        candidate.name, model, lr=1e-4, weight_decay=1e-4, **candidate.options
    )
    return per_call(optimizer.step, device, seconds)


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """GB/s of a copy within the device's memory, reads and writes added."""
    size = 1 << (28 if device.type == "cuda" else 26)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / per_call(lambda: target.copy_(source), device, seconds) / 1e9


def per_call(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of a call, from groups of calls, after a group that is not counted."""
    calls = _CALLS if device.type == "cuda" else 1
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < 2 or (len(times) < 11 and time.perf_counter() < deadline):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        training.wait(device)
        times.append((time.perf_counter() - began) / calls)
    times = sorted(times[1:])
    return times[len(times) // 2]
