"""Published results, and the studies that train their settings.

The numbers are in experiments/published.csv. Its columns are the study, the optimizer, the effective batch size, the
base rate, the epochs of warm-up, the top-1 in percent, and the seconds of training. An empty field was not published.

* cifar10-attempt1 to cifar10-attempt5: https://github.com/cmpark0126/pytorch-LARS. ResNet-50 on CIFAR-10. The top-1 is
  the best of any epoch, except that attempts 1 to 4 list for LARS the value closest to the baseline. Attempt 5 is from
  its checkpoints.
* imagenet-table: ResNet-50 on ImageNet, 90 epochs; https://github.com/NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch (NUS), and
  https://github.com/kakaobrain/torchlars (best top-1).
"""

from __future__ import annotations

import csv
from pathlib import Path

from experiments.tuning import Flags, Ladder, Line

TABLE = Path(__file__).with_suffix(".csv")


def rows(study: str) -> list[dict[str, str]]:
    """The published rows of a study, such as ``rows("cifar10-attempt3")``."""
    with TABLE.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["study"] == study]


def top1(study: str) -> dict[str, dict[int, float]]:
    """The published top-1 in percent: optimizer -> (batch size -> top-1)."""
    found: dict[str, dict[int, float]] = {}
    for row in rows(study):
        found.setdefault(row["optimizer"], {})[int(row["batch"])] = float(row["top1"])
    return found


def cifar10(attempt: int) -> Ladder:
    """An attempt of cmpark0126/pytorch-LARS: ResNet-50 on CIFAR-10, batch size 128 k."""
    study = f"cifar10-attempt{attempt}"
    rates = {int(row["batch"]): float(row["base_lr"]) for row in rows(study)}
    epochs = 175 if attempt == 5 else 200
    init = ("--weight-init", "kaiming_uniform") if attempt >= 3 else ()

    def flags(batch: int) -> Flags:
        k = batch // 128
        rise = {1: k, 2: 2 * k, 3: 2, 4: 5, 5: 2}[attempt]
        end = {1: 1.5e-5 * k, 2: 1e-5}.get(attempt, 1e-5 * k)
        return ("--dataset", "cifar10", "--model", "resnet50", *init, "--epochs", str(epochs),
                "--effective-batch-size", str(batch), "--batch-size", "128", "--warmup-epochs", "5",
                "--lr-schedule", "epochwise-polynomial", "--warmup-multiplier", str(rise),
                "--lr-power", "2", "--end-lr", f"{end:g}", "--label-smoothing", "0",
                "--no-bn-bias-separately")  # fmt: skip

    def rate(batch: int) -> list[float]:
        return [rates[batch]]

    lars = ("--base-op", "lars", "--lars-form", "cmpark", "--trust-coefficient", "0.1",
            "--wd", "5e-3")  # fmt: skip
    return Ladder(
        f"CIFAR-10, ResNet-50, {epochs} epochs, attempt {attempt}",
        (Line("SGD", ("--base-op", "sgd", "--wd", "5e-4"), rate), Line("LARS", lars, rate)),
        tuple(rates), flags, seeds=(0,), published=top1(study),
    )  # fmt: skip


# The recipes of the ImageNet table: optimizer -> name of the recipe without the batch size.
RECIPES = {
    "LARS (NUS)": "imagenet_lars",
    "SGD (torchlars)": "imagenet_torchlars_sgd",
    "LARS (torchlars)": "imagenet_torchlars",
}


def imagenet() -> Ladder:
    """The recipes of the published trainers: ResNet-50 on ImageNet."""
    study = "imagenet-table"
    rates = {(row["optimizer"], int(row["batch"])): float(row["base_lr"]) for row in rows(study)}

    def line(name: str, recipe: str) -> Line:
        return Line(
            name,
            (),
            lambda batch: [rates[name, batch]] if (name, batch) in rates else [],
            lambda batch: (("--recipe", f"{recipe}_{batch}"),),
        )

    return Ladder(
        "ImageNet, ResNet-50, 90 epochs", tuple(line(*item) for item in RECIPES.items()),
        tuple(sorted({batch for _, batch in rates})), lambda batch: (), seeds=(42,), chance=0.1,
        script="train_imagenet.py", published=top1(study),
    )  # fmt: skip
