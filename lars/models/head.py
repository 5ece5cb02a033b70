"""The head of a classification network: the layers that produce the scores of the classes."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def heads_of(model: nn.Module, num_classes: int) -> list[str]:
    """Names of the layers that produce the class scores.

    They are the parts that ``model.get_classifier()`` returns, if the network has this method, as those of timm do.
    Otherwise it is the last `nn.Linear` or `nn.Conv2d`, if it has `num_classes` outputs.

    Args:
        model: The network. Its layers are in the order in which they are used.
        num_classes: The number of classes.

    Returns:
        The names in the order of the network. Empty if there is no such layer.

    Example:
        heads_of(torchvision.models.resnet50(), 1000)  # ["fc"]
        heads_of(torchvision.models.squeezenet1_0(), 1000)  # ["classifier.1"]
    """
    declared = _declared(model)
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    if declared:
        return [name for name, module in layers if module in declared]
    if not layers or _outputs(layers[-1][1]) != num_classes:
        return []
    return [layers[-1][0]]


def freeze_all_but(model: nn.Module, trained: Collection[str]) -> None:
    """Train only some parts of a network.

    The parameters of the other parts need no gradient, and these parts always compute as in evaluation. So their
    BatchNorm statistics do not change, and their dropout does nothing.

    Args:
        model: The network, which changes in place. Its names of parameters and its type for ``isinstance`` stay.
        trained: Names of the parts to train.
    """
    model.requires_grad_(False)
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    kind = type(model)
    # A subclass instead of a wrapper, because a wrapper would change the names of the parameters. An attribute would
    # still belong to the original after a copy of the network, such as the moving average.
    model.__class__ = type(kind.__name__, (_MostlyFrozen, kind), {"trained": tuple(trained)})
    model.train(model.training)


class _MostlyFrozen(nn.Module):
    """A network of which only the parts `trained` change between training and evaluation."""

    trained: tuple[str, ...] = ()

    def train(self, mode: bool = True) -> _MostlyFrozen:
        super().train(False)
        self.training = mode
        for name in self.trained:
            self.get_submodule(name).train(mode)
        return self


def _declared(model: nn.Module) -> set[nn.Module]:
    """The layers within the parts that the network itself declares as its classifier."""
    method = getattr(model, "get_classifier", None)
    if not callable(method):
        return set()
    parts = method()
    parts = parts if isinstance(parts, tuple | list) else [parts]
    return {layer for part in parts if isinstance(part, nn.Module) for layer in part.modules()}


def _outputs(layer: nn.Module) -> int:
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert isinstance(width, int)
    return width
