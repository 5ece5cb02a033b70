"""Classification networks by name or import path, with random initial weights. Nothing is downloaded."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from lars.errors import UsageError
from lars.importing import cause, import_named, is_import_path
from lars.models.alexnet_bn import alexnet_bn
from lars.models.initial_weights import fill_weights
from lars.models.small_cnn import small_cnn, small_cnn_bn

# Networks of this library. The other names are those of torchvision.
OWN = {"alexnet_bn": alexnet_bn, "small_cnn": small_cnn, "small_cnn_bn": small_cnn_bn}


def names() -> list[str]:
    """The names that `build` accepts besides import paths."""
    return [*OWN, *torchvision_names()]


def torchvision_names() -> list[str]:
    """The names of torchvision's classification networks."""
    import torchvision

    found: list[str] = torchvision.models.list_models(module=torchvision.models)
    return found


def builder(name: str) -> Callable[..., Any]:
    """The function or class that builds the network ``package.module:name``, or a network by its name.

    Raises:
        UsageError: There is no such function or name.
    """
    if is_import_path(name):
        found: Callable[..., Any] = import_named("--model", name)
        if not callable(found):
            raise UsageError(
                f"--model {name} is an object of type {type(found).__name__}; name a function or a class that takes "
                "num_classes and gives a network"
            )
        return found
    if name in OWN:
        return OWN[name]
    if name not in names():
        if "." in name:
            raise UsageError(
                f"--model {name} is not known; a network of your own needs a colon between module and function: "
                f"--model {':'.join(name.rsplit('.', 1))}"
            )
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}? The" if near else "the"
        raise UsageError(
            f"--model {name} is not known; {hint} known networks are: {', '.join(names())}; your own network is "
            "package.module:function"
        )
    return partial(_torchvision_network, name)


def build(
    name: str,
    num_classes: int,
    *,
    small_stem: bool = False,
    weight_init: str = "default",
    zero_init_last_gamma: bool = False,
) -> nn.Module:
    """Build a classification network.

    Args:
        name: torchvision's name (resnet50, resnet18, vgg16_bn, efficientnet_b0 ...), a key of `OWN`, or the import
            path ``package.module:function`` of a function or class that takes the argument ``num_classes``.
        num_classes: Width of the last layer.
        small_stem: Whether to adapt the first layers to small images; see `shrink_stem`.
        weight_init: Initial weights of convolutions and linear layers, one of `lars.names.WEIGHT_INITS`.
        zero_init_last_gamma: Whether to initialise the weight of the last BatchNorm of every residual branch to zero,
            so that each block starts as the identity (Goyal et al. 2017, section 5.1). Only for ResNets and variants.

    Raises:
        UsageError: The name is unknown, the function of an import path fails, or `small_stem` or
            `zero_init_last_gamma` does not apply to the network.
    """
    make = builder(name)
    model = _called(make, name, num_classes) if is_import_path(name) else make(num_classes)
    if small_stem:
        shrink_stem(name, model)
    fill_weights(model, weight_init)
    if zero_init_last_gamma:
        _zero_last_gammas(name, model)
    return model


def _called(make: Callable[..., Any], name: str, num_classes: int) -> nn.Module:
    """The network that a function of the user builds."""
    try:
        model = make(num_classes=num_classes)
    except Exception as error:  # code of the user raises anything
        raise UsageError(
            f"--model {name} failed with num_classes={num_classes} ({cause(error)}); correct the function, which must "
            "take the argument num_classes"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"--model {name} gives an object of type {type(model).__name__} instead of a torch.nn.Module; return the "
            "network"
        )
    return model


def _torchvision_network(name: str, num_classes: int) -> nn.Module:
    import torchvision

    options: dict[str, object] = {"weights": None, "num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        # The auxiliary heads need a loss that the trainer does not have.
        options |= {"aux_logits": False, "init_weights": True}
    model: nn.Module = torchvision.models.get_model_builder(name)(**options)
    return model


def shrink_stem(name: str, model: nn.Module) -> None:
    """Adapt the first layers of a ResNet or an EfficientNet to images of about 32 to 64 pixels.

    The first convolution becomes a 3x3 convolution with stride 1, and a max-pooling after it is removed. This is the
    usual form of ResNets for CIFAR. The weights do not fit torchvision's ResNet of the same name any more.

    Args:
        name: The network's name, for the message.
        model: The network, which changes in place.

    Raises:
        UsageError: The network is neither of the two.
    """
    from torchvision.models import EfficientNet, ResNet

    if isinstance(model, ResNet):
        channels = model.conv1.out_channels
        model.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        # torchvision fills the convolutions of a ResNet in this way.
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    elif isinstance(model, EfficientNet):
        model.features[0][0].stride = (1, 1)
    else:
        raise UsageError(
            f"--small-stem is for ResNets and EfficientNets, not for {name}; leave it out"
        )


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
