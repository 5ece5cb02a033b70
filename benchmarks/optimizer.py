"""Compares the time of an optimizer step with torch's fused kernels and with published code.

    python -m benchmarks.optimizer                   # the whole table, one thread
    python -m benchmarks.optimizer --only lars --rounds 30
    python -m benchmarks.optimizer --net tiny        # or a network of torchvision

Each candidate takes a step on the 161 parameters of ResNet-50 (25.6 million float32 values, 54
adapted tensors, 107 norms and biases), or on those of another network: "tiny" has 10,000 tensors of
10 elements. All candidates share parameters and gradients. Each round times each candidate once, so
that a slow moment of the machine affects all of them, and divides its time by that of its baseline:
torch's fused SGD with momentum and weight decay for SGD and LARS, and torch's fused AdamW for LAMB.
The table shows the median time and the median ratio. Compare ratios, and only within one run.

Peers come from their packages (timm, pytorch_optimizer) if these are installed. Published code
without a package is restated here, operation by operation.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.rounds import Turn, alone, in_turn, missing
from lars import LAMB, LARS, TVLARS, LARSWrapper
from lars.names import LAMB_FORMS, LARS_FORMS

LR, MOMENTUM, DECAY = 1e-4, 0.9, 1e-4


def resnet50_shapes() -> Iterator[tuple[int, ...]]:
    """The shapes of ResNet-50's parameters, in order."""

    def convolution(inputs: int, outputs: int, size: int) -> Iterator[tuple[int, ...]]:
        yield from ((outputs, inputs, size, size), (outputs,), (outputs,))  # BatchNorm follows

    yield from convolution(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from convolution(inputs, width, 1)
            yield from convolution(width, width, 3)
            yield from convolution(width, 4 * width, 1)
            if block == 0:
                yield from convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    yield from ((1000, 2048), (1000,))


def shapes_of(net: str) -> list[tuple[int, ...]]:
    """The shapes of the parameters of a network."""
    if net == "resnet50":
        return list(resnet50_shapes())
    if net == "tiny":
        return [(5, 2)] * 10_000
    import torchvision

    with torch.device("meta"):
        return [tuple(p.shape) for p in torchvision.models.get_model(net).parameters()]


def parameter_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """One group with weight matrices, and one with norms and biases."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


# --------------------------------------------------------------------- published updates, restated


class Restated(Optimizer):
    """An update that handles one tensor at a time and reads values back to the host."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Call ``self.update`` on each parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, p.grad, self.state[p], group)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Update one tensor."""
        raise NotImplementedError

    def momentum(self, state: dict[str, Any], d: Tensor) -> Tensor:
        """Add d to the momentum buffer, and return the buffer."""
        if "b" not in state:
            state["b"] = torch.zeros_like(d)
        return state["b"].mul_(MOMENTUM).add_(d)


class NusLars(Restated):
    """NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        ratio = 1.0
        if group.get("adapt", True):
            w_norm, g_norm = torch.norm(p), torch.norm(g)
            if w_norm > 0 and g_norm > 0:
                quotient = w_norm / (g_norm + DECAY * w_norm + 1e-5) * 1e-3
                ratio = torch.clamp(quotient, 0.0, 50).item()
            g = g.add(p, alpha=DECAY)
        p.add_(self.momentum(state, torch.clamp(g, -10.0, 10.0)), alpha=-LR * ratio)


class TvlarsLars(Restated):
    """KhoiDOO/tvlars, LARS and TVLARS."""

    time_varying = False

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if group.get("adapt", True):
            d = g.add(p, alpha=DECAY)
            w_norm, d_norm, one = torch.norm(p), torch.norm(d), torch.ones_like(torch.norm(p))
            if self.time_varying:
                w_norm, d_norm = w_norm.clamp(0, 10), d_norm.clamp(0, 10)
            ratio = torch.where(
                w_norm > 0, torch.where(d_norm > 0, 1e-3 * w_norm / d_norm, one), one
            )
            if self.time_varying:
                ratio = ratio * (0.1 + torch.exp(torch.tensor(1e-3))).pow(-1)
            state["log"] = ratio.item(), w_norm.item(), d_norm.item()
            g = d.mul(ratio)
        p.add_(self.momentum(state, g), alpha=-LR)


class TvlarsTvlars(TvlarsLars):
    """KhoiDOO/tvlars, TVLARS."""

    time_varying = True


class TvlarsLamb(Restated):
    """KhoiDOO/tvlars and cybertronai/pytorch-lamb, LAMB."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(m=torch.zeros_like(p), v=torch.zeros_like(p))
        m = state["m"].mul_(0.9).add_(g, alpha=0.1)
        v = state["v"].mul_(0.999).addcmul_(g, g, value=0.001)
        u = m / v.sqrt().add(1e-6)
        if group["weight_decay"]:
            u.add_(p, alpha=group["weight_decay"])
        w_norm, u_norm = p.pow(2).sum().sqrt().clamp(0, 10), u.pow(2).sum().sqrt()
        ratio = 1 if w_norm == 0 or u_norm == 0 else w_norm / u_norm
        p.add_(u, alpha=-float(LR * ratio))


class AdaptsGradients(Optimizer):
    """torchlars and apex LARC: rewrite p.grad, then step with fused SGD without weight decay."""

    def __init__(self, params: Any, clip: bool) -> None:
        super().__init__(params, {"lr": LR})
        self.clip = clip
        self.base = SGD(
            [{"params": g["params"]} for g in self.param_groups], LR, MOMENTUM, fused=True
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Rewrite the gradients, then take a step."""
        for group in self.param_groups:
            for p in group["params"]:
                w_norm, g_norm = torch.norm(p), torch.norm(p.grad)
                decay = group["weight_decay"]
                ratio = 1e-3 * w_norm / (g_norm + decay * w_norm + 1e-8)
                if self.clip:
                    if w_norm == 0 or g_norm == 0:
                        continue
                    ratio = min(ratio / LR, 1)
                p.grad.add_(p, alpha=decay).mul_(ratio)
        self.base.step()


# ------------------------------------------------------------------------------------- candidates


Build = Callable[[list[dict[str, Any]]], Optimizer]
SGD_FUSED, ADAMW_FUSED = "torch SGD fused", "torch AdamW fused"


@dataclass
class Candidate:
    """An optimizer to time, with the name of its baseline and an upper limit for their ratio.

    `build` is None if the optimizer's package is not installed.
    """

    name: str
    build: Build | None
    baseline: str
    target: float | None = None


def candidates() -> list[Candidate]:
    """The optimizers of torch, of this library, and of the peers."""
    lars: dict[str, Build | None] = {
        SGD_FUSED: lambda g: SGD(g, LR, MOMENTUM, fused=True),
        "torch SGD for-loop": lambda g: SGD(g, LR, MOMENTUM, foreach=False),
        "torch SGD foreach": lambda g: SGD(g, LR, MOMENTUM, foreach=True),
        **{
            f"LARS {form}": partial(LARS, lr=LR, momentum=MOMENTUM, form=form)
            for form in LARS_FORMS
        },
        "TVLARS": partial(TVLARS, lr=LR),
        "LARSWrapper(SGD)": lambda g: LARSWrapper(SGD(g, LR, MOMENTUM)),
        "LARS path=loop": partial(LARS, lr=LR, momentum=MOMENTUM, path="loop"),
        "LARS path=foreach": partial(LARS, lr=LR, momentum=MOMENTUM, path="foreach"),
        "peer: NUS (restated)": lambda g: NusLars(g, {"lr": LR}),
        "peer: torchlars (restated)": partial(AdaptsGradients, clip=False),
        "peer: apex LARC (restated)": partial(AdaptsGradients, clip=True),
        "peer: tvlars LARS (restated)": lambda g: TvlarsLars(g, {"lr": LR}),
        "peer: tvlars TVLARS (restated)": lambda g: TvlarsTvlars(g, {"lr": LR}),
    }
    lamb: dict[str, Build | None] = {
        ADAMW_FUSED: lambda g: AdamW(g, LR, fused=True),
        "torch AdamW foreach": lambda g: AdamW(g, LR, foreach=True),
        **{f"LAMB {form}": partial(LAMB, lr=LR, form=form) for form in LAMB_FORMS},
        "peer: tvlars LAMB (restated)": lambda g: TvlarsLamb(g, {"lr": LR}),
    }
    for package, names in (
        ("timm.optim", ("Lars", "Lamb")),
        ("pytorch_optimizer", ("LARS", "Lamb")),
    ):
        module = None if missing(package) else importlib.import_module(package)
        for family, name, options in (
            (lars, names[0], {"momentum": MOMENTUM}),
            (lamb, names[1], {}),
        ):
            for foreach in (False, True):
                kind = "foreach" if foreach else "for-loop"
                family[f"peer: {package} {name} {kind}"] = module and partial(
                    getattr(module, name), lr=LR, foreach=foreach, **options
                )
    targets = {f"LARS {form}": 1.5 for form in LARS_FORMS} | {
        "TVLARS": 1.6,
        "LARSWrapper(SGD)": 1.6,
    }
    targets |= {f"LAMB {form}": 2.0 for form in LAMB_FORMS}
    return [
        Candidate(name, build, baseline, targets.get(name))
        for baseline, family in ((SGD_FUSED, lars), (ADAMW_FUSED, lamb))
        for name, build in family.items()
    ]


# ------------------------------------------------------------------------------------ measurement


def seconds(
    step: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The time of one call, including the work that it queues on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def timers(
    chosen: list[Candidate],
    shapes: list[tuple[int, ...]],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Turn]:
    """Turns that measure the seconds of a step of each candidate. All share parameters and gradients."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=generator) for s in shapes]
    params = [nn.Parameter((0.05 * x).to(device)) for x in values]
    grads = [(1e-4 * x.flip(0)).to(device) for x in values]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()

    def measure(optimizer: Optimizer) -> float:
        # Some peers scale the gradients in place, so restore them. Write the gradients of the
        # first layer last, which leaves the caches as a backward pass does.
        for p, g in reversed(list(zip(params, grads, strict=True))):
            p.grad.copy_(g)
        return seconds(optimizer.step, device, clock)

    optimizers = {c.name: c.build(parameter_groups(params)) for c in chosen if c.build}
    return [alone(name, partial(measure, optimizer)) for name, optimizer in optimizers.items()]


def report(chosen: list[Candidate], times: dict[str, list[float]]) -> None:
    """Print the table."""
    for candidate in chosen:
        baseline, own = times[candidate.baseline], times[candidate.name]
        ratio = statistics.median(a / b for a, b in zip(own, baseline, strict=True))
        if candidate.name == candidate.baseline:
            print(f"\n{'':34}{'median ms':>10}   x {candidate.baseline}")
        verdict = ""
        if candidate.target is not None:
            outcome = "met" if ratio <= candidate.target else "missed"
            verdict = f"   target {candidate.target:.1f} {outcome}"
        print(f"{candidate.name:34}{1e3 * statistics.median(own):10.2f}{ratio:9.2f}{verdict}")


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second read and written by a copy of 100 MB."""
    source = torch.zeros(25_000_000, device=device)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(20))
    return 2 * source.numel() * source.element_size() / best


def main() -> None:
    """Parse the flags, measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="measurements of each candidate (15)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (1)")
    parser.add_argument("--net", default="resnet50", help="of torchvision, or tiny (resnet50)")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--only", default="", help="only candidates with this in their name")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    every = candidates()
    names = {c.name for c in every if args.only.lower() in c.name.lower()}
    if not names:
        parser.error(f"--only {args.only}: no candidate has this in its name")
    names |= {c.baseline for c in every if c.name in names}
    chosen = [c for c in every if c.name in names and c.build]
    for candidate in every:
        if candidate.name in names and not candidate.build:
            print(f"{candidate.name}: this package is not installed")
    shapes = shapes_of(args.net)
    size = sum(torch.Size(shape).numel() for shape in shapes)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} thread(s), {size:,} values")
    bandwidth = copy_bandwidth(args.device) / 1e9
    print(f"copying 100 MB: {bandwidth:.1f} GB/s read and written; ", end="")
    print(f"SGD moves at least {5 * 4 * size / 1e6:.0f} MB, AdamW {7 * 4 * size / 1e6:.0f} MB")
    report(chosen, in_turn(timers(chosen, shapes, args.device), args.rounds))


if __name__ == "__main__":
    main()
