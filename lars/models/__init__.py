"""Classification networks by name, with random initial weights. Nothing is downloaded."""

from __future__ import annotations

import difflib

from torch import nn

from lars.errors import UsageError
from lars.models.initial_weights import fill_weights
from lars.models.small_cnn import small_cnn, small_cnn_bn

# Networks of this library. The other names are those of torchvision.
OWN = {"small_cnn": small_cnn, "small_cnn_bn": small_cnn_bn}


def names() -> list[str]:
    """The names that `build` accepts."""
    import torchvision

    return [*OWN, *torchvision.models.list_models(module=torchvision.models)]


def build(
    name: str,
    num_classes: int,
    *,
    weight_init: str = "default",
    zero_init_last_gamma: bool = False,
) -> nn.Module:
    """Build a classification network.

    Args:
        name: torchvision's name (resnet50, resnet18, vgg16_bn, efficientnet_b0 ...) or a key of `OWN`.
        num_classes: Width of the last layer.
        weight_init: Initial weights of convolutions and linear layers, one of `lars.names.WEIGHT_INITS`.
        zero_init_last_gamma: Whether to initialise the weight of the last BatchNorm of every residual branch to zero,
            so that each block starts as the identity (Goyal et al. 2017, section 5.1). Only for ResNets and variants.

    Raises:
        UsageError: The name is unknown, or `zero_init_last_gamma` does not apply to the network.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}? The" if near else "the"
        raise UsageError(
            f"--model {name} is not known; {hint} known networks are: {', '.join(names())}"
        )
    model = OWN[name](num_classes) if name in OWN else _torchvision_network(name, num_classes)
    fill_weights(model, weight_init)
    if zero_init_last_gamma:
        _zero_last_gammas(name, model)
    return model


def _torchvision_network(name: str, num_classes: int) -> nn.Module:
    import torchvision

    options: dict[str, object] = {"weights": None, "num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        # The auxiliary heads need a loss that the trainer does not have.
        options |= {"aux_logits": False, "init_weights": True}
    model: nn.Module = torchvision.models.get_model_builder(name)(**options)
    return model


def _zero_last_gammas(name: str, model: nn.Module) -> None:
    from torchvision.models.resnet import BasicBlock, Bottleneck

    last = {BasicBlock: "bn2", Bottleneck: "bn3"}
    blocks = [m for m in model.modules() if type(m) in last]
    if not blocks:
        raise UsageError(
            f"--zero-init-last-gamma is for ResNets; {name} has no such residual blocks"
        )
    for block in blocks:
        nn.init.zeros_(getattr(block, last[type(block)]).weight)
