"""Augmentation of small images: padded crops, rotation, and the two views of Barlow Twins."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from data.pixels.boxes import Pixels, uniform
from data.pixels.transforms import FullImageTransform


@dataclass(frozen=True)
class PaddedCrop(FullImageTransform):
    """Crop a random square from the image with a black border, and perhaps mirror and rotate it.

    Given the same random stream the result equals, bit for bit, that of torchvision's RandomCrop,
    RandomHorizontalFlip and RandomRotation in sequence.

    Attributes:
        size: Side of the image and of the result in pixels.
        padding: Width of the border in pixels.
        flip: Mirror half of the images, at random.
        rotation: Largest angle of rotation in degrees.
    """

    size: int
    padding: int
    flip: bool
    rotation: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a transformed image."""
        return 3, self.size, self.size

    def __call__(self, pixels: Pixels, generator: Generator) -> Tensor:
        """Transform one image."""
        border = self.padding
        padded = np.pad(pixels, ((border, border), (border, border), (0, 0)))
        top = left = 0
        if border:
            places = 2 * border + 1
            top = int(torch.randint(places, (1,), generator=generator).item())
            left = int(torch.randint(places, (1,), generator=generator).item())
        image = torch.from_numpy(padded).permute(2, 0, 1)
        image = image[:, top : top + self.size, left : left + self.size]
        if self.flip and torch.rand(1, generator=generator).item() < 0.5:
            image = image.flip(-1)
        if self.rotation:
            from torchvision.transforms import functional

            angle = uniform(-self.rotation, self.rotation, generator).item()
            image = functional.rotate(image, angle)
        return image


@dataclass(frozen=True)
class TwoViews(FullImageTransform):
    """The two distorted views of Barlow Twins (Zbontar et al., 2021, appendix A).

    Attributes:
        size: Side of each view in pixels.
    """

    size: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of a transformed image."""
        return 2, 3, self.size, self.size

    def __call__(self, pixels: Pixels, generator: Generator) -> Tensor:
        """Transform one image."""
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        # torchvision draws from the global generator only.
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which seeds GPUs too and formats a stack trace for each call.
            torch.default_generator.manual_seed(
                int(torch.randint(2**63 - 1, (1,), generator=generator).item())
            )
            return torch.stack(
                [
                    _distortion(self.size, blur=1.0, solarize=0.0)(image),
                    _distortion(self.size, blur=0.1, solarize=0.2)(image),
                ]
            )


@functools.cache
def _distortion(size: int, blur: float, solarize: float) -> Callable[[Tensor], Tensor]:
    from torchvision import transforms

    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    kernel = max(size // 20 * 2 + 1, 3)  # a tenth of the image, as in SimCLR (Chen et al., 2020)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                size, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True
            ),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([transforms.GaussianBlur(kernel, (0.1, 2.0))], p=blur),
            transforms.RandomSolarize(threshold=128, p=solarize),
        ]
    )
