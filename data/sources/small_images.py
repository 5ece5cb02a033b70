"""What the sources of small images have in common: flags, transforms and loaders.

Importing it loads neither torch nor NumPy.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data import DataError, TrainLoader, ValLoader
from data.folder import refuse_unused

if TYPE_CHECKING:
    from data.loading import CountedSamples, Transform


@dataclass(frozen=True)
class SmallImages:
    """Images of one small size, kept in memory; a source fills in where they come from.

    With two views an image batch has the shape (n, 2, 3, side, side).
    """

    padding: int = field(
        default=4,
        metadata={"help": "training: cut a random square out of the image with this black border"},
    )
    flip: bool = field(
        default=True, metadata={"help": "training: mirror every second image, at random"}
    )
    rotation: float = field(
        default=0.0, metadata={"help": "training: turn by up to this angle, in degrees"}
    )
    views: int = field(
        default=1,
        metadata={
            "help": "training: 2 gives the two distorted views of Barlow Twins instead",
            "choices": (1, 2),
        },
    )

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        raise NotImplementedError

    def _load(self) -> tuple[CountedSamples, CountedSamples]:
        """Read training and validation samples."""
        raise NotImplementedError

    @functools.cached_property
    def _samples(self) -> tuple[CountedSamples, CountedSamples]:
        return self._load()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self._samples[0].num_classes

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self._samples[0])

    @property
    def val_size(self) -> int:
        """Number of validation images."""
        return len(self._samples[1])

    @property
    def fingerprint(self) -> str:
        """Which samples these are; see `data`."""
        return f"{self._samples[0].fingerprint}-{self._samples[1].fingerprint}"

    def check(self) -> None:
        """Raise DataError for flags or files that are not usable."""
        if not 0 <= self.padding <= self.image_size:
            raise DataError(f"--padding {self.padding} must lie between 0 and {self.image_size}")
        if not 0 <= self.rotation <= 180:
            raise DataError(f"--rotation {self.rotation} must lie between 0 and 180")
        if self.views == 2:
            refuse_unused(self, ["padding", "flip", "rotation"], "beside --views 2")
        _ = self._samples

    def start_workers(self) -> None:
        """Start the process that loader processes are forked from."""
        from data.workers import start_forkserver

        start_forkserver()

    def train_loader(
        self,
        *,
        batch_size: int,
        effective_batch_size: int,
        drop_last: bool,
        rank: int,
        size: int,
        seed: int,
        workers: int,
    ) -> TrainLoader:
        """Make the training loader of one rank."""
        from data import loading, transforms
        from data.sampler import Order

        transform: Transform = (
            transforms.TwoViews(self.image_size)
            if self.views == 2
            else transforms.PaddedCrop(self.image_size, self.padding, self.flip, self.rotation)
        )
        reader = loading.Reader(self._samples[0], transform, seed)
        order = Order(self.train_size, batch_size, effective_batch_size, drop_last, seed)
        return loading.TrainLoader(reader, order, rank, size, workers)

    def val_loader(self, *, batch_size: int, rank: int, size: int, workers: int) -> ValLoader:
        """Make the validation loader of one rank: the images as they are."""
        from data import loading, transforms

        reader = loading.Reader(
            self._samples[1], transforms.ValTransform(self.image_size, self.image_size)
        )
        return loading.ValLoader(reader, batch_size, rank, size, workers)
