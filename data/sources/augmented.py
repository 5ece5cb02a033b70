"""Flags that sources with augmented training images have in common.

Importing it loads neither torch nor NumPy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data import FlagError
from data.sources.base import BaseSource, refuse_unused

if TYPE_CHECKING:
    from data.pixels.transforms import Transform

_GROUP = "augmentation"

# The largest magnitude of torchvision's RandAugment, which has 31 levels.
_LARGEST_MAGNITUDE = 30

# The flags that change pixels.
PIXEL_FLAGS = ("auto_augment", "ra_ops", "ra_magnitude", "color_jitter", "random_erasing")


@dataclass(frozen=True, kw_only=True)
class AugmentedSource(BaseSource):
    """A source whose training images are augmented after they are cropped and mirrored."""

    auto_augment: str | None = field(
        default=None,
        metadata={
            "help": "training: change colours and shape at random, after crop and mirror: ra "
            "(RandAugment), ta (TrivialAugment, wide) or aa (AutoAugment, policy of ImageNet), as "
            "in torchvision",
            "choices": ("ra", "ta", "aa"),
            "group": _GROUP,
        },
    )
    ra_ops: int = field(
        default=2,
        metadata={
            "help": "with --auto-augment ra: operations on each image",
            "group": _GROUP,
        },
    )
    ra_magnitude: int = field(
        default=9,
        metadata={
            "help": "with --auto-augment ra: strength of the operations, from 0 to "
            f"{_LARGEST_MAGNITUDE}",
            "group": _GROUP,
        },
    )
    color_jitter: float = field(
        default=0.0,
        metadata={
            "help": "training: multiply brightness, contrast and saturation, each by a random "
            "factor between max(0, 1 - X) and 1 + X",
            "group": _GROUP,
        },
    )
    random_erasing: float = field(
        default=0.0,
        metadata={
            "help": "training: probability with which a random rectangle of an image gets the mean "
            "colour",
            "group": _GROUP,
        },
    )
    repeated_aug: int = field(
        default=1,
        metadata={
            "help": "training: each step takes N differently augmented copies of each of its "
            "images, so an epoch sees one in N images",
            "group": _GROUP,
        },
    )

    def augmented(self, transform: Transform) -> Transform:
        """Return a transform that is followed by the augmentation of the flags."""
        if not (self.auto_augment or self.color_jitter or self.random_erasing):
            return transform
        from data.pixels.augment import Augmented

        red, green, blue = map(round, self.mean)
        return Augmented(
            transform,
            self.auto_augment,
            self.ra_ops,
            self.ra_magnitude,
            self.color_jitter,
            self.random_erasing,
            (red, green, blue),
        )

    @property
    def augmentation(self) -> str:
        """The augmentation of the flags in words; empty if there is none."""
        policies = {
            "ra": f"RandAugment (operations {self.ra_ops}, magnitude {self.ra_magnitude})",
            "ta": "TrivialAugment",
            "aa": "AutoAugment",
        }
        parts = [
            policies.get(self.auto_augment or "", ""),
            f"colour jitter {self.color_jitter:g}" if self.color_jitter else "",
            f"random erasing with probability {self.random_erasing:g}"
            if self.random_erasing
            else "",
            f"{self.repeated_aug} copies of each image" if self.repeated_aug > 1 else "",
        ]
        return ", ".join(filter(None, parts))

    def check(self) -> None:
        """Raise DataError for flags or files that cannot be used."""
        if self.auto_augment != "ra":
            refuse_unused(self, ["ra_ops", "ra_magnitude"], "without --auto-augment ra")
        if self.ra_ops < 1:
            raise FlagError(f"--ra-ops {self.ra_ops} must be at least 1")
        if not 0 <= self.ra_magnitude <= _LARGEST_MAGNITUDE:
            raise FlagError(
                f"--ra-magnitude {self.ra_magnitude} must lie between 0 and {_LARGEST_MAGNITUDE}"
            )
        if not 0 <= self.color_jitter < math.inf:
            raise FlagError(
                f"--color-jitter {self.color_jitter:g} must be a finite number of at least 0"
            )
        if not 0 <= self.random_erasing <= 1:
            raise FlagError(f"--random-erasing {self.random_erasing:g} must lie between 0 and 1")
        if self.repeated_aug < 1:
            raise FlagError(f"--repeated-aug {self.repeated_aug} must be at least 1")
        super().check()

    def start_workers(self, workers: int) -> None:
        """Start the process that workers are forked from; do nothing for 0 workers."""
        uses_torchvision = self.auto_augment or self.color_jitter or self.random_erasing
        self.start_forkserver(workers, ["torchvision.transforms.v2"] if uses_torchvision else [])


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Read the value of ``--image-size-schedule``.

    Args:
        text: ``1:128,10:160``: 128 pixels from epoch 1 on, 160 pixels from epoch 10 on.

    Returns:
        Pairs of (first epoch, side in pixels). Epochs count from 1.

    Raises:
        FlagError: The text is not such a list.
    """
    flag = f"--image-size-schedule {text}"
    try:
        pairs = [tuple(map(int, entry.split(":"))) for entry in text.split(",")]
        stages = tuple((epoch, size) for epoch, size in pairs)
    except ValueError:
        raise FlagError(
            f"{flag}: give EPOCH:SIZE,EPOCH:SIZE,... in whole numbers, for example 1:128,10:160"
        ) from None
    epochs = [epoch for epoch, _ in stages]
    if epochs[0] != 1:
        raise FlagError(
            f"{flag}: the first entry must be for epoch 1, for example 1:{stages[0][1]}"
        )
    if epochs != sorted(set(epochs)):
        raise FlagError(f"{flag}: the epochs must increase")
    if min(size for _, size in stages) < 1:
        raise FlagError(f"{flag}: a size must be at least 1 pixel")
    return stages
