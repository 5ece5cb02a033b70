"""scikit-learn's handwritten digits in memory: a real data set that needs no files.

Importing this loads neither torch nor NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data import DataError
from data.sources.small_images import SmallImages

if TYPE_CHECKING:
    from data.samples.arrays import ArraySamples


@dataclass(frozen=True)
class Digits(SmallImages):
    """The images and the split of ``python -m data.digits``, but not compressed as JPEGs."""

    flip: bool = field(
        default=False, metadata={"help": "training: mirror half of the images, at random"}
    )

    image_size = 32
    # Statistics of the enlarged training images.
    mean = (79.0,) * 3
    std = (89.0,) * 3

    def open_samples(self) -> tuple[ArraySamples, ArraySamples]:
        """Load and enlarge the digits."""
        import numpy as np

        from data.samples.arrays import ArraySamples

        try:
            from data.digits import enlarged_digits

            digits = enlarged_digits()
        except ImportError as error:
            raise DataError(
                f"the digits need scikit-learn ({error}); run ./launch/setup.sh"
            ) from error

        def split(name: str) -> ArraySamples:
            mine = [digit for digit in digits if digit.split == name]
            images = np.stack([np.asarray(digit.image) for digit in mine])
            labels = np.array([digit.label for digit in mine])
            return ArraySamples(images, labels, 10, [str(digit) for digit in range(10)])

        return split("train"), split("val")
