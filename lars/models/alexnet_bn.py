"""AlexNet with BatchNorm, the network of the LARS paper for large batches."""

from __future__ import annotations

from torch import nn


def alexnet_bn(num_classes: int) -> nn.Module:
    """Build torchvision's AlexNet with BatchNorm after each convolution and each hidden linear layer.

    Like torchvision's alexnet, it is the network of Krizhevsky, "One weird trick" (arXiv 1404.5997), with convolutions
    of 64, 192, 384, 256 and 256 channels. The AlexNet-BN of the LARS paper (arXiv 1708.03888) is made from
    Caffe's AlexNet by replacing local response normalisation with BatchNorm. Caffe's has 96, 256, 384, 384 and 256
    channels, and its second, fourth and fifth convolutions have two groups. So published accuracies and rates need not
    carry over exactly. There is no local response normalisation. Layers before BatchNorm have no bias. Dropout is that
    of torchvision's alexnet.

    Args:
        num_classes: Width of the last layer.

    Example:
        alexnet_bn(1000)(torch.randn(2, 3, 224, 224)).shape  # (2, 1000); images need at least 63 pixels
    """
    return nn.Sequential(
        *_convolution(3, 64, 11, stride=4, padding=2),
        nn.MaxPool2d(3, 2),
        *_convolution(64, 192, 5, padding=2),
        nn.MaxPool2d(3, 2),
        *_convolution(192, 384, 3, padding=1),
        *_convolution(384, 256, 3, padding=1),
        *_convolution(256, 256, 3, padding=1),
        nn.MaxPool2d(3, 2),
        nn.AdaptiveAvgPool2d(6),
        nn.Flatten(),
        *_hidden(256 * 6 * 6, 4096),
        *_hidden(4096, 4096),
        nn.Linear(4096, num_classes),
    )


def _convolution(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, padding: int
) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _hidden(inputs: int, outputs: int) -> list[nn.Module]:
    linear = nn.Linear(inputs, outputs, bias=False)
    return [nn.Dropout(), linear, nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
