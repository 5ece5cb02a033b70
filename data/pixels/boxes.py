"""Boxes: which part of an image to take. An image is a uint8 array (height, width, 3)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # (top, left, height, width)

# Maps an image's (height, width) to the box to take from it; called once for each image.
CropFn = Callable[[int, int], Box]


def full_image(height: int, width: int) -> Box:
    """Return the box that covers the full image."""
    return 0, 0, height, width


def crop(pixels: Pixels, box: Box) -> Pixels:
    """Return a box of an image, without copying it."""
    top, left, height, width = box
    return pixels[top : top + height, left : left + width]


def random_box(
    height: int,
    width: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: Generator,
) -> Box:
    """Draw the box of a random resized crop (Szegedy et al., 2015, as torchvision samples it).

    Given the same random stream it returns what ``RandomResizedCrop.get_params`` returns.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        area: Smallest and largest fraction of the image's area; drawn uniformly.
        aspect: Smallest and largest width / height; its logarithm is drawn uniformly.
        generator: Source of randomness: two draws for each of at most ten attempts, and two more
            for the position of a box that fits.

    Returns:
        (top, left, height, width). If no attempt fits, it is the largest central box whose aspect
        ratio is allowed.
    """
    low, high = _logarithms(aspect)
    for _ in range(10):
        target = height * width * uniform(*area, generator).item()
        ratio = torch.exp(uniform(low, high, generator)).item()
        box_width = round(math.sqrt(target * ratio))
        box_height = round(math.sqrt(target / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = torch.randint(height - box_height + 1, (1,), generator=generator).item()
            left = torch.randint(width - box_width + 1, (1,), generator=generator).item()
            return int(top), int(left), box_height, box_width
    box_height, box_width = height, width
    if width / height < aspect[0]:
        box_height = round(width / aspect[0])
    elif width / height > aspect[1]:
        box_width = round(height * aspect[1])
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


@functools.cache
def _logarithms(aspect: tuple[float, float]) -> list[float]:
    return torch.log(torch.tensor(aspect)).tolist()  # in float32, as in torchvision


def uniform(low: float, high: float, generator: Generator) -> Tensor:
    """Draw one float32 number between `low` and `high`."""
    return torch.empty(1).uniform_(low, high, generator=generator)
