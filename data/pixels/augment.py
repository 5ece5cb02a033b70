"""Augmentation: torchvision's policies, padded crops of small images, the two views of Barlow Twins."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from data.pixels.boxes import Box, Pixels, uniform
from data.pixels.transforms import FullImageTransform, Transform


@contextmanager
def global_stream(generator: Generator) -> Iterator[None]:
    """Let torch's global generator continue the stream of `generator` during the block.

    torchvision draws from the global generator only. Afterwards the global generator has its earlier
    state, and `generator` the state after the draws. Both exchanges take 2 microseconds; fork_rng
    takes 3.5.
    """
    earlier = torch.default_generator.get_state()
    torch.default_generator.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(earlier)


@dataclass(frozen=True)
class Augmented:
    """A transform that is followed by operations of torchvision (``transforms.v2``).

    Given the same random stream the result equals, bit for bit, that of torchvision's transforms in
    sequence. Colours and shapes are changed in PIL images, as in torchvision's training script:
    this takes less time than the same operations on tensors, most of all the sharpening.

    Attributes:
        crop: The transform before.
        auto_augment: ``ra``: RandAugment (Cubuk et al., 2020). ``ta``: TrivialAugmentWide (Müller
            and Hutter, 2021). ``aa``: AutoAugment with ImageNet's policy (Cubuk et al., 2019). All
            interpolate bilinearly and fill with black.
        ra_ops: Number of operations of RandAugment.
        ra_magnitude: Strength of these operations, 0 to 30.
        color_jitter: Largest relative change of brightness, contrast and saturation.
        random_erasing: Probability of random erasing (Zhong et al., 2020).
        mean: Colour of an erased rectangle, in units of 0..255. It is rounded, so after
            normalisation an erased pixel is not 0 but at most 0.5 / std from it.
    """

    crop: Transform
    auto_augment: str | None = None
    ra_ops: int = 2
    ra_magnitude: int = 9
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    mean: tuple[int, int, int] = (0, 0, 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a transformed image."""
        return self.crop.shape

    def box(self, height: int, width: int, generator: Generator) -> Box:
        """Return the box of an image that the transform needs."""
        return self.crop.box(height, width, generator)

    def __call__(self, pixels: Pixels, generator: Generator) -> Tensor:
        """Transform the box of one image."""
        image = self.crop(pixels, generator)
        with global_stream(generator):
            return self._operations(image)

    @functools.cached_property
    def _operations(self) -> Callable[[Tensor], Tensor]:
        # This loads torchvision, which workers without augmentation do not need.
        from torchvision.transforms import v2

        bilinear: dict[str, Any] = {"interpolation": v2.InterpolationMode.BILINEAR}
        colours: list[Callable[[Any], Any]] = []
        if self.auto_augment == "ra":
            colours.append(v2.RandAugment(self.ra_ops, self.ra_magnitude, **bilinear))
        elif self.auto_augment == "ta":
            colours.append(v2.TrivialAugmentWide(**bilinear))
        elif self.auto_augment == "aa":
            colours.append(v2.AutoAugment(**bilinear))
        if self.color_jitter:
            change = self.color_jitter
            colours.append(v2.ColorJitter(brightness=change, contrast=change, saturation=change))
        steps = [v2.ToPILImage(), *colours, v2.PILToTensor()] if colours else []
        if self.random_erasing:
            steps.append(v2.RandomErasing(self.random_erasing, value=self.mean))
        return v2.Compose(steps)


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
        seed = int(torch.randint(2**63 - 1, (1,), generator=generator).item())
        with global_stream(generator):
            # Not torch.manual_seed, which seeds GPUs too and formats a stack trace for each call.
            torch.default_generator.manual_seed(seed)
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
