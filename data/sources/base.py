"""What all sources have in common: sizes, the fingerprint and the loaders."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Self

from data import IMAGENET_MEAN, IMAGENET_STD, FlagError, Share, TrainLoader, ValLoader

if TYPE_CHECKING:
    from data.loader.order import Blocks
    from data.pixels.transforms import ByEpoch, Transform
    from data.samples import LabelledSamples


class BaseSource:
    """A source that reads sample by sample. The contract is in `data`.

    A new source is a frozen dataclass of flags that inherits from this class. It defines
    `image_size`, `open_samples`, `train_transform` and `val_transform`, usually `mean` and `std`,
    and extends `check` if its flags can be wrong.
    """

    # A subclass may turn these into flags.
    on_bad_image = "error"
    max_bad_images = 0
    repeated_aug = 1

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        raise NotImplementedError

    @property
    def train_sizes(self) -> tuple[tuple[int, int], ...]:
        """Pairs of (first epoch from 1, side of the training images in pixels)."""
        return ((1, self.image_size),)

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of each channel in units of 0..255; ImageNet's unless a source has its own."""
        return IMAGENET_MEAN

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of each channel in units of 0..255."""
        return IMAGENET_STD

    def open_samples(self) -> tuple[LabelledSamples, LabelledSamples]:
        """Return training and validation samples; raise DataError if they cannot be used."""
        raise NotImplementedError

    def open_val(self) -> LabelledSamples:
        """Return the validation samples; a source that can open them alone overrides this."""
        return self.open_samples()[1]

    def train_transform(self) -> Transform | ByEpoch:
        """Return the transform of training images."""
        raise NotImplementedError

    def val_transform(self) -> Transform:
        """Return the transform of validation images."""
        raise NotImplementedError

    @functools.cached_property
    def samples(self) -> tuple[LabelledSamples, LabelledSamples]:
        """Training and validation samples, opened when they are first needed."""
        return self.open_samples()

    def for_validation(self) -> Self:
        """This source with its validation samples in place of the training samples."""
        alone, val = copy.copy(self), self.open_val()
        vars(alone)["samples"] = (val, val)  # instead of the cached property
        return alone

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.samples[0].num_classes

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of the labels; empty if they are unknown."""
        return list(self.samples[0].class_names)

    @property
    def warnings(self) -> list[str]:
        """What looks wrong about the data but does not forbid training, and what was left out."""
        return []

    @property
    def description(self) -> str:
        """One line about where the images are; empty if the flags say it."""
        return ""

    @property
    def augmentation(self) -> str:
        """The augmentation of the training images in words; empty if there is none."""
        return ""

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self.samples[0])

    @property
    def val_size(self) -> int:
        """Number of validation images."""
        return len(self.samples[1])

    @property
    def fingerprint(self) -> str:
        """Identity of the samples; see `data`."""
        train, val = self.samples
        return f"{train.fingerprint}-{val.fingerprint}"

    @property
    def block(self) -> Blocks:
        """Training samples that are shuffled as one; see `data.loader.order.permutation`."""
        return 1

    @property
    def on_bad_val_image(self) -> str:
        """Policy for validation: a replacement would count twice, so the image is left out."""
        return "skip" if self.on_bad_image == "replace" else self.on_bad_image

    def check(self) -> None:
        """Raise DataError for flags or files that cannot be used."""
        _ = self.samples

    def start_workers(self, workers: int) -> None:
        """Start the process that workers are forked from; do nothing for 0 workers."""
        self.start_forkserver(workers)

    def start_forkserver(self, workers: int, modules: Sequence[str] = ()) -> None:
        """Start the fork server for workers that need `modules` too; do nothing for 0 workers."""
        from data.loader.workers import check_open_files, start_forkserver

        if workers:
            check_open_files(workers)
            start_forkserver(modules)

    def train_loader(self, share: Share, workers: int) -> TrainLoader:
        """Make the training loader of one rank."""
        from data.loader.reader import Reader
        from data.loader.torch_loader import TrainLoader

        reader = Reader(
            self.samples[0],
            self.train_transform(),
            share.seed,
            self.on_bad_image,
            self.max_bad_images,
        )
        return TrainLoader(reader, share, workers, self.block, self.repeated_aug)

    def val_loader(self, share: Share, workers: int) -> ValLoader:
        """Make the validation loader of one rank."""
        from data.loader.reader import Reader
        from data.loader.torch_loader import ValLoader

        reader = Reader(
            self.samples[1],
            self.val_transform(),
            on_bad_image=self.on_bad_val_image,
            max_bad_images=self.max_bad_images,
        )
        return ValLoader(reader, share, workers)


def refuse_unused(source: Any, names: Sequence[str], where: str) -> None:
    """Raise FlagError if one of these fields was given but would be ignored `where`."""
    for field in fields(source):
        value = getattr(source, field.name)
        if field.name in names and value != field.default:
            name = field.name.replace("_", "-")
            given = f"--no-{name}" if value is False else f"--{name} {value}"
            raise FlagError(f"{given} has no effect {where}")
