"""Image folders: the source of train_imagenet.py. Importing it loads neither torch nor NumPy."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast

from data import IMAGENET_MEAN, IMAGENET_STD, DataError, TrainLoader, ValLoader

if TYPE_CHECKING:
    from data.loading import ListedSamples
    from data.transforms import TrainTransform, ValTransform
    from data.tree import FileTree

_IMAGENET = os.path.join(tempfile.gettempdir(), "imagenet")


@dataclass(frozen=True)
class ImageFolders:
    """Training and validation images in one folder per class, ImageNet's layout.

    The contract is in `data`. A label is the position of the class folder's name in sorted order,
    the rule of torchvision's ImageFolder.
    """

    train_dir: str = field(
        default=os.path.join(_IMAGENET, "ILSVRC2012_img_train"),
        metadata={"help": "folder of training images, one folder per class", "same_run": False},
    )
    val_dir: str = field(
        default=os.path.join(_IMAGENET, "ILSVRC2012_img_val"),
        metadata={
            "help": "folder of validation images, one folder per class, the same classes",
            "same_run": False,
        },
    )
    image_size: int = field(
        default=224, metadata={"help": "side of the square images that the network sees, in pixels"}
    )
    val_resize: int | None = field(
        default=None,
        metadata={
            "help": "validation: length of the shorter side before the central square is cut out, "
            "in pixels; default: image size * 256 / 224"
        },
    )
    crop_area: tuple[float, float] = field(
        default=(0.08, 1.0),
        metadata={
            "help": "training: least and greatest share of an image's area that a random crop takes"
        },
    )
    crop_aspect: tuple[float, float] = field(
        default=(3 / 4, 4 / 3),
        metadata={"help": "training: least and greatest width / height of a random crop"},
    )
    flip: bool = field(
        default=True, metadata={"help": "training: mirror every second image, at random"}
    )
    exclude: str | None = field(
        default=None,
        metadata={
            "help": "file that lists images to leave out, as python -m data.check writes it",
            "same_run": False,
        },
    )
    on_bad_image: str = field(
        default="error",
        metadata={
            "help": "what to do about an image that cannot be read: stop; leave it out; or, in "
            "training, take the next one instead",
            "choices": ("error", "skip", "replace"),
            "same_run": False,
        },
    )
    max_bad_images: int = field(
        default=100,
        metadata={
            "help": "stop anyway if more images than this cannot be read on one rank",
            "same_run": False,
        },
    )

    exact_pil = False
    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    @functools.cached_property
    def _train(self) -> ListedSamples:
        from data.tree import read_excluded, scan

        return scan(self.train_dir, "--train-dir", read_excluded(self.exclude, "train"))

    @functools.cached_property
    def _val(self) -> ListedSamples:
        from data.tree import read_excluded, scan

        return scan(self.val_dir, "--val-dir", read_excluded(self.exclude, "val"))

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self._train.num_classes

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self._train)

    @property
    def val_size(self) -> int:
        """Number of validation images."""
        return len(self._val)

    @property
    def fingerprint(self) -> str:
        """Which samples these are; see `data`."""
        return f"{self._train.fingerprint}-{self._val.fingerprint}"

    @property
    def _resize(self) -> int:
        if self.val_resize is None:
            return round(self.image_size * 256 / 224)
        return self.val_resize

    def check(self) -> None:
        """Raise DataError unless both trees hold the same classes and the sizes make sense."""
        check_crops(self.image_size, self._resize, self.crop_area, self.crop_aspect)
        if self.max_bad_images < 0:
            raise DataError(f"--max-bad-images {self.max_bad_images} must be 0 or more")
        self._check_samples()

    def _check_samples(self) -> None:
        from data.tree import some

        train, val = cast("FileTree", self._train).classes, cast("FileTree", self._val).classes
        if train != val:
            only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
            raise DataError(
                f"--train-dir {self.train_dir} and --val-dir {self.val_dir} must hold the same "
                "class folders, else labels mean different classes. "
                f"Only in train: {some(only_train)}; only in val: {some(only_val)}"
            )

    def start_workers(self) -> None:
        """Start the process that decoding processes are forked from."""
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
        from data import loading
        from data.sampler import Order

        self._mention_unmatched(rank)
        reader = loading.Reader(
            self._train, self._train_transform(), seed, self.on_bad_image, self.max_bad_images
        )
        order = Order(
            self.train_size, batch_size, effective_batch_size, drop_last, seed, self._block
        )
        return loading.TrainLoader(reader, order, rank, size, workers, self.max_bad_images)

    def val_loader(self, *, batch_size: int, rank: int, size: int, workers: int) -> ValLoader:
        """Make the validation loader of one rank."""
        from data import loading

        reader = loading.Reader(
            self._val, self._val_transform(), on_bad_image=self._on_bad_val_image
        )
        return loading.ValLoader(reader, batch_size, rank, size, workers, self.max_bad_images)

    def _train_transform(self) -> TrainTransform:
        from data.transforms import TrainTransform

        return TrainTransform(
            self.image_size, self.crop_area, self.crop_aspect, self.flip, self.exact_pil
        )

    def _val_transform(self) -> ValTransform:
        from data.transforms import ValTransform

        return ValTransform(self._resize, self.image_size, self.exact_pil)

    def _mention_unmatched(self, rank: int) -> None:
        """Say, on the first rank, what --exclude names and is not there."""
        from data.tree import some

        unmatched = [*self._train.unmatched, *self._val.unmatched]
        if rank == 0 and unmatched:
            print(
                f"warning: --exclude {self.exclude}: no image for {some(unmatched)}",
                file=sys.stderr,
            )

    @property
    def _on_bad_val_image(self) -> str:
        """An image that stands for another would count twice: leave it out instead."""
        return "skip" if self.on_bad_image == "replace" else self.on_bad_image

    @property
    def _block(self) -> int:
        return 1


def check_crops(
    image_size: int,
    val_resize: int,
    crop_area: tuple[float, float],
    crop_aspect: tuple[float, float],
) -> None:
    """Raise DataError, in the flags' names, for sizes and crops that cannot be had."""
    if image_size < 1:
        raise DataError(f"--image-size {image_size} must be 1 at least")
    if val_resize < image_size:
        raise DataError(f"--val-resize {val_resize} must be at least --image-size {image_size}")
    if not 0 < crop_area[0] <= crop_area[1] <= 1:
        raise DataError(
            f"--crop-area {crop_area[0]} {crop_area[1]}: give two shares, smaller first, in (0, 1]"
        )
    if not 0 < crop_aspect[0] <= crop_aspect[1]:
        raise DataError(
            f"--crop-aspect {crop_aspect[0]} {crop_aspect[1]}: "
            "give two positive ratios, smaller first"
        )


def refuse_unused(source: Any, names: Sequence[str], where: str) -> None:
    """Raise DataError for one of these fields that was given, and would be ignored `where`."""
    for each in fields(source):
        value = getattr(source, each.name)
        if each.name in names and value != each.default:
            name = each.name.replace("_", "-")
            said = f"--no-{name}" if value is False else f"--{name} {value}"
            raise DataError(f"{said} has no effect {where}")
