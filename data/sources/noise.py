"""Seeded noise as a source without files, for speed measurements and tests.

Importing this loads neither torch nor NumPy.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data import FlagError
from data.sources.base import BaseSource

if TYPE_CHECKING:
    from data.pixels.boxes import CropFn, Pixels
    from data.pixels.transforms import ValTransform

# A prime number of bytes: steps of _STRIDE visit all of them before an image comes back.
_BLOCK, _STRIDE = 1_000_003, 7919


@dataclass(frozen=True)
class Synthetic(BaseSource):
    """Images of noise with labels index % classes.

    Image i is the same in every epoch and differs from all others. Its mean grey level grows with
    its class, so that a network can learn it.
    """

    image_size: int = field(default=224, metadata={"help": "side of the square images, in pixels"})
    num_classes: int = field(default=1000, metadata={"help": "number of classes"})
    train_size: int = field(default=1_281_167, metadata={"help": "number of training images"})
    val_size: int = field(default=50_000, metadata={"help": "number of validation images"})

    mean = (127.5, 127.5, 127.5)
    std = (64.0, 64.0, 64.0)

    def open_samples(self) -> tuple[_Noise, _Noise]:
        """Number the images: training images first, then validation images."""
        return (
            _Noise(self.train_size, 0, self.num_classes, self.image_size),
            _Noise(self.val_size, self.train_size, self.num_classes, self.image_size),
        )

    def train_transform(self) -> ValTransform:
        """Return the images unchanged."""
        return self.val_transform()

    def val_transform(self) -> ValTransform:
        """Return the images unchanged."""
        from data.pixels.transforms import ValTransform

        return ValTransform(self.image_size, self.image_size)

    def check(self) -> None:
        """Raise FlagError for impossible sizes."""
        for name in ("image_size", "num_classes", "train_size", "val_size"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise FlagError(f"{flag} {getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class _Noise:
    """Numbers `first` .. `first + size` of the noise."""

    size: int
    first: int
    num_classes: int
    side: int

    @property
    def class_names(self) -> list[str]:
        """The labels as text."""
        return [str(label) for label in range(self.num_classes)]

    @property
    def fingerprint(self) -> str:
        """A constant: the flags determine the images, and they are compared as well."""
        return "noise"

    def __len__(self) -> int:
        return self.size

    def read(self, index: int, crop_fn: CropFn) -> tuple[Pixels, int]:
        """Return an image and its label: a window of one block of noise, brighter by its class."""
        import numpy as np

        from data.pixels.boxes import crop

        numel = 3 * self.side * self.side
        start = (self.first + index) * _STRIDE % _BLOCK
        label = index % self.num_classes
        brightness = np.uint8(label * 127 // self.num_classes)
        window = _block(numel)[start : start + numel] + brightness
        image = window.reshape(self.side, self.side, 3)
        return crop(image, crop_fn(self.side, self.side)), label


@functools.cache
def _block(numel: int) -> Pixels:
    import numpy as np

    words = np.random.Philox(key=0).random_raw((_BLOCK + numel) // 8 + 1)
    return words.view(np.uint8)[: _BLOCK + numel] >> np.uint8(1)
