"""What the sources of small images have in common: flags and transforms.

Importing it loads neither torch nor NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data import FlagError
from data.sources.augmented import PIXEL_FLAGS, AugmentedSource
from data.sources.base import refuse_unused

if TYPE_CHECKING:
    from data.pixels.transforms import Transform


@dataclass(frozen=True)
class SmallImages(AugmentedSource):
    """Images of one small size, kept in memory. A source defines where they come from.

    With two views an image batch has the shape (n, 2, 3, side, side).
    """

    padding: int = field(
        default=4,
        metadata={
            "help": "training: width of the black border, in pixels, from which a random square "
            "of the image's size is cropped"
        },
    )
    flip: bool = field(
        default=True, metadata={"help": "training: mirror half of the images, at random"}
    )
    rotation: float = field(
        default=0.0, metadata={"help": "training: largest angle of a random rotation, in degrees"}
    )
    views: int = field(
        default=1,
        metadata={
            "help": "2 gives the two distorted views of each image that Barlow Twins needs",
            "choices": (1, 2),
        },
    )

    def train_transform(self) -> Transform:
        """Return a padded crop, or the two views."""
        from data.pixels.augment import PaddedCrop, TwoViews

        if self.views == 2:
            return TwoViews(self.image_size)
        crop = PaddedCrop(self.image_size, self.padding, self.flip, self.rotation)
        return self.augmented(crop)

    def val_transform(self) -> Transform:
        """Return the images unchanged, or two views, which are the same in every validation."""
        from data.pixels.augment import TwoViews
        from data.pixels.transforms import ValTransform

        if self.views == 2:
            return TwoViews(self.image_size)
        return ValTransform(self.image_size, self.image_size)

    def check(self) -> None:
        """Raise DataError for flags or files that cannot be used."""
        if not 0 <= self.padding <= self.image_size:
            raise FlagError(f"--padding {self.padding} must lie between 0 and {self.image_size}")
        if not 0 <= self.rotation <= 180:
            raise FlagError(f"--rotation {self.rotation} must lie between 0 and 180")
        if self.views == 2:
            refuse_unused(self, ["padding", "flip", "rotation", *PIXEL_FLAGS], "with --views 2")
        super().check()
