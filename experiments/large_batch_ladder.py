#!/usr/bin/env python
"""Accuracy over the batch size for several optimizers, each tuned with the same budget.

python experiments/large_batch_ladder.py --preset digits
python experiments/large_batch_ladder.py --preset mnist -- --data-dir DIR
python experiments/large_batch_ladder.py --preset cifar10-attempt3 --ranks 8 -- --archive cifar-10-python.tar.gz
python experiments/large_batch_ladder.py --preset imagenet-table --ranks 8 -- --train-dir DIR/train --val-dir DIR/val

digits and mnist tune every optimizer at every batch size. mnist-muon has one line more, for which you install
pytorch_optimizer; with the --out of mnist it trains only that line. The other presets train the published settings of
experiments/published.csv, and their figures show the published accuracies, dashed.
"""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import published
from experiments.sweep import run_study
from experiments.tuning import AROUND, Flags, Ladder, Line, grid, small


def lines(epochs: int, train_size: int) -> tuple[Line, ...]:
    """The optimizers of the tuned studies, for a run of this many epochs."""

    def steps(batch: int) -> int:
        return epochs * math.ceil(train_size / batch)

    def tried(batch: int) -> int:  # a second option is worth its time only in short runs
        return 2 if steps(batch) < 500 else 1

    def warm_ups(batch: int) -> list[Flags]:
        return [("--warmup-epochs", f"{share * epochs:g}") for share in (0.1, 0.3)][: tried(batch)]

    def factors(batch: int) -> list[Flags]:  # TVLARS has no warm-up; its factor decreases instead
        return [("--lmbda", f"{fall / steps(batch):.3g}") for fall in (5, 2.5)][: tried(batch)]

    decay, decay_lamb = ("--lr-power", "2", "--wd", "1e-4"), ("--lr-power", "2", "--wd", "0.01")
    sgd = ("--base-op", "sgd", *decay)
    return (
        Line("SGD", sgd, grid(0.05, 128, "linear", (1.0,)), lambda batch: warm_ups(batch)[:1],
             "not tuned"),
        Line("Nesterov", (*sgd, "--nesterov"), grid(0.05, 128, "sqrt", AROUND), warm_ups),
        Line("LARS", ("--base-op", "lars", *decay), grid(1.0, 128, "sqrt", AROUND), warm_ups),
        Line("LAMB", ("--base-op", "lamb", *decay_lamb), grid(0.004, 128, "sqrt", AROUND), warm_ups),
        Line("TVLARS", ("--base-op", "tvlars", "--wd", "1e-4"), grid(0.5, 128, "sqrt", AROUND), factors),
    )  # fmt: skip


MUON = Line(  # of the package pytorch_optimizer; biases and norms are trained with its AdamW
    "Muon", ("--base-op", "pytorch_optimizer:Muon", "--optimizer-options", "adamw_lr=0.001",
             "--lr-power", "2", "--wd", "0"),
    lambda batch: [x * 0.02 for x in AROUND] if batch >= 4096 else [],
    lambda batch: (("--warmup-epochs", "0.3"), ("--warmup-epochs", "0.9")),
)  # fmt: skip
MNIST = Ladder(
    "MNIST, small network, 3 epochs", lines(3, 60_000), (256, 16384, 4096, 1024, 64),
    partial(small, "mnist", 3), seeds=(0, 1),
)  # fmt: skip
PRESETS = {
    "digits": Ladder("Handwritten digits, small network, 20 epochs", lines(20, 1437), (256, 1024, 64, 16),
                     partial(small, "digits", 20), seeds=(0, 1, 2)),
    "mnist": MNIST,
    "mnist-muon": replace(MNIST, lines=(*MNIST.lines, MUON)),
    **{f"cifar10-attempt{n}": published.cifar10(n) for n in (1, 2, 3, 4, 5)},
    "imagenet-table": published.imagenet(),
}  # fmt: skip

if __name__ == "__main__":
    run_study(PRESETS, __doc__)
