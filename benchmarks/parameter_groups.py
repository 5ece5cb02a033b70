"""Compare the parameter groups of this library with timm's rule on networks of the package timm.

The command prints a table. docs/optimizers.md shows it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lars import parameter_groups
from lars.optim.groups import KINDS

NETWORKS = (
    "resnet50", "resnetv2_50", "vit_small_patch16_224", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224",
    "convnext_tiny", "xcit_nano_12_p16_224", "efficientnet_b0", "regnety_004", "mobilenetv3_small_050",
    "beit_base_patch16_224", "cait_xxs24_224", "coat_tiny", "mixer_s32_224", "dm_nfnet_f0", "vgg11_bn", "densenet121",
    "inception_v3", "levit_128s", "pvt_v2_b0", "maxvit_tiny_tf_224",
)  # fmt: skip


def without_decay(groups: list[dict[str, Any]]) -> set[int]:
    """The identities of the parameters without weight decay."""
    return {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}


def row(name: str, model: nn.Module) -> str:
    """A row of the table: tensors, and those that the default and all four words treat differently from timm."""
    from timm.optim import param_groups_weight_decay

    named = getattr(model, "no_weight_decay", tuple)()
    theirs = without_decay(param_groups_weight_decay(model, 1e-4, no_weight_decay_list=named))
    ours = [without_decay(parameter_groups(model, 1e-4, exclude=e)) for e in (("norm", "bias"), KINDS)]  # fmt: skip
    tensors = len(list(model.parameters()))
    return f"| {name} | {tensors} | {len(theirs ^ ours[0])} | {len(theirs ^ ours[1])} |"


def main() -> None:
    """Print a row for each network."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parameter_groups", description=__doc__
    )
    parser.parse_args()
    try:
        import timm
    except ImportError as error:
        parser.error(f"timm is needed ({error}); ./launch/setup.sh --peers installs it")
    for name in NETWORKS:
        with torch.device("meta"):
            print(row(name, timm.create_model(name)), flush=True)


if __name__ == "__main__":
    main()
