"""Measures how far one outlier among the gradients moves a weight, for each form of LARS and LAMB.

    python -m benchmarks.outlier
    python -m benchmarks.outlier --factor 1000 --momentum 0.95

A weight matrix gets random gradients of constant norm until the momentum buffer is in its steady
state. Then one gradient is `--factor` times as large, and ordinary gradients follow. Each rule has
the learning rate at which its ordinary step is 0.5 % of the norm of the weight. The table shows the
largest step of those after the outlier, relative to the norm of the weight, and how far the weight is
afterwards from where it would be without the outlier.

Where the trust ratio is applied after the momentum buffer (``inside="none"``), the ratio of the next
ordinary gradient multiplies the outlier in the buffer. Where it is applied before, the ratio of the
outlier itself scales it down.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lars import LAMB, LARS, TVLARS
from lars.names import LAMB_FORMS, LARS_FORMS

SHAPE, GRAD_NORM, DECAY = (64, 64), 0.05, 1e-4
WARM, AFTER = 60, 30  # steps before and after the outlier
ORDINARY = 0.005  # the step that every rule takes, relative to the norm of the weight

Build = Callable[[list[nn.Parameter], float], Optimizer]


@dataclass(frozen=True)
class Rule:
    """A rule to measure.

    Attributes:
        build: Creates its optimizer for a learning rate.
        clip: Bound of the norm of the gradients, as by ``--clip-grad-norm``; None: no bound.
    """

    name: str
    build: Build
    clip: float | None = None


@dataclass(frozen=True)
class Row:
    """The result of one rule.

    Attributes:
        largest: The largest step from the outlier on, relative to the norm of the weight.
        displaced: The distance between the final weights with and without the outlier, relative to
            the norm of the weight.
    """

    name: str
    largest: float
    displaced: float


def rules(momentum: float) -> list[Rule]:
    """The rules to compare."""
    options: dict[str, Any] = {"momentum": momentum, "weight_decay": DECAY}

    def lars(form: str, params: list[nn.Parameter], lr: float) -> Optimizer:
        return LARS(params, lr, form=form, **options)

    def lamb(form: str, params: list[nn.Parameter], lr: float) -> Optimizer:
        return LAMB(params, lr, (momentum, 0.999), weight_decay=0.01, form=form)

    return [
        *(Rule(f"LARS {form}", partial(lars, form)) for form in LARS_FORMS),
        Rule("LARS nus, clipped", partial(lars, "nus"), clip=2 * GRAD_NORM),
        # With lmbda=0 the factor of the ratio does not fall during the measurement.
        Rule("TVLARS", lambda params, lr: TVLARS(params, lr, lmbda=0.0, **options)),
        *(Rule(f"LAMB {form}", partial(lamb, form)) for form in LAMB_FORMS),
        Rule("SGD", lambda params, lr: SGD(params, lr, **options)),
    ]


def steps(rule: Rule, lr: float, factor: float) -> tuple[list[float], Tensor]:
    """The size of each step relative to the norm of the weight, and the final weight."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(SHAPE, generator=generator, dtype=torch.float64))
    optimizer = rule.build([weight], lr)
    norm = weight.detach().norm()
    sizes = []
    for k in range(WARM + AFTER):
        grad = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        weight.grad = grad * (GRAD_NORM / grad.norm()) * (factor if k == WARM else 1.0)
        if rule.clip is not None:
            torch.nn.utils.clip_grad_norm_([weight], rule.clip)
        before = weight.detach().clone()
        optimizer.step()
        sizes.append(((weight.detach() - before).norm() / norm).item())
    return sizes, weight.detach()


def measure(rule: Rule, factor: float) -> Row:
    """Choose the learning rate, and compare a run with the outlier to one without it."""
    lr = 1e-3
    for _ in range(10):  # the step is about proportional to the rate
        ordinary, _ = steps(rule, lr, 1.0)
        lr *= ORDINARY / ordinary[WARM - 1]
    _, without = steps(rule, lr, 1.0)
    sizes, with_outlier = steps(rule, lr, factor)
    displaced = (with_outlier - without).norm() / without.norm()
    return Row(rule.name, max(sizes[WARM:]), displaced.item())


def main() -> None:
    """Parse the flags, measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--factor", type=float, default=100.0, help="size of the outlier (100)")
    parser.add_argument("--momentum", type=float, default=0.9, help="momentum or beta1 (0.9)")
    args = parser.parse_args()
    print(f"one gradient x {args.factor:g}, momentum {args.momentum:g}; relative to ‖w‖")
    print(f"{'':20}{'largest step':>14}{'x ordinary':>12}{'displaced by':>14}")
    for rule in rules(args.momentum):
        row = measure(rule, args.factor)
        times = row.largest / ORDINARY
        print(f"{row.name:20}{row.largest:>14.1%}{times:>12.1f}{row.displaced:>14.1%}")


if __name__ == "__main__":
    main()
