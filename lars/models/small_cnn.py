"""A small convolutional network for images of 28 or more pixels, fast enough for studies on a CPU."""

from __future__ import annotations

from torch import nn

CHANNELS = (16, 32, 64)
HIDDEN = 128
# Side of the feature map before the linear layers, in pixels. It is that of a 28 x 28 image after three poolings.
SIDE = 3


def small_cnn(num_classes: int) -> nn.Module:
    """Build three 3x3 convolutions, each with 2x2 max-pooling and ReLU, then one hidden linear layer.

    The network has no BatchNorm, so the size of a micro-batch does not change its gradients. It has 98,730 parameters
    with 10 classes.

    Args:
        num_classes: Width of the last layer.
    """
    return _network(num_classes, batch_norm=False)


def small_cnn_bn(num_classes: int) -> nn.Module:
    """Build `small_cnn` with BatchNorm after each convolution and after the hidden linear layer."""
    return _network(num_classes, batch_norm=True)


def _network(num_classes: int, *, batch_norm: bool) -> nn.Module:
    features: list[nn.Module] = []
    for inputs, outputs in zip((3, *CHANNELS), CHANNELS, strict=False):
        features.append(nn.Conv2d(inputs, outputs, 3, padding=1))
        if batch_norm:
            features.append(nn.BatchNorm2d(outputs))
        # ReLU after the pooling gives the same values as before it, and has a quarter of the work.
        features += [nn.MaxPool2d(2), nn.ReLU()]
    return nn.Sequential(
        *features,
        nn.AdaptiveAvgPool2d(SIDE),
        nn.Flatten(),
        nn.Linear(CHANNELS[-1] * SIDE**2, HIDDEN),
        *([nn.BatchNorm1d(HIDDEN)] if batch_norm else []),
        nn.ReLU(),
        nn.Linear(HIDDEN, num_classes),
    )
