"""Image folders, one folder per class. Importing this loads neither torch nor NumPy."""

from __future__ import annotations

import functools
import math
import os
import sys
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from data import DataError, FlagError, Share, TrainLoader
from data.sources.augmented import AugmentedSource, parse_sizes
from data.sources.base import refuse_unused

if TYPE_CHECKING:
    from data.layouts import Found, Options
    from data.loader.order import Blocks
    from data.pixels.transforms import ByEpoch, TrainTransform, Transform, ValTransform
    from data.samples import ExcludableSamples, NumberedSamples
    from data.samples.tree import FileTree

_IMAGENET = os.path.join(tempfile.gettempdir(), "imagenet")


@dataclass(frozen=True)
class ImageFolders(AugmentedSource):
    """Training and validation images in one folder per class, ImageNet's layout.

    A label is the position of the class folder's name in sorted order, as in torchvision's
    ImageFolder.
    """

    train_dir: str = field(
        default=os.path.join(_IMAGENET, "ILSVRC2012_img_train"),
        metadata={"help": "folder of training images, one folder per class", "same_run": False},
    )
    val_dir: str = field(
        default=os.path.join(_IMAGENET, "ILSVRC2012_img_val"),
        metadata={
            "help": "folder of validation images, with the same class folders",
            "same_run": False,
        },
    )
    image_size: int = field(
        default=224,
        metadata={"help": "side of the square images that the network gets, in pixels"},
    )
    val_resize: int | None = field(
        default=None,
        metadata={
            "help": "validation: length of the shorter side before the central square is cropped, "
            "in pixels; default: image size * 256 / 224"
        },
    )
    crop_area: tuple[float, float] = field(
        default=(0.08, 1.0),
        metadata={
            "help": "training: smallest and largest fraction of an image's area that a random crop "
            "takes"
        },
    )
    crop_aspect: tuple[float, float] = field(
        default=(3 / 4, 4 / 3),
        metadata={"help": "training: smallest and largest width / height of a random crop"},
    )
    flip: bool = field(
        default=True, metadata={"help": "training: mirror half of the images, at random"}
    )
    exclude: str | None = field(
        default=None,
        metadata={
            "help": "file that lists images to leave out, as written by python -m data.check",
            "same_run": False,
        },
    )
    on_bad_image: str = field(
        default="error",
        metadata={
            "help": "what to do with an image that cannot be read: error stops the run, skip leaves "
            "it out, replace takes the next one instead (training only; validation skips)",
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

    image_size_schedule: str | None = field(
        default=None,
        metadata={
            "help": "training: side of the images from these epochs on, EPOCH:SIZE,EPOCH:SIZE,... with "
            "epochs as the trainer prints them, from 1 (1:128,10:160); --image-size stays the size of "
            "the validation",
            "group": "augmentation",
        },
        kw_only=True,
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "where the images are, instead of the other flags that name folders: the layout "
            "is recognised (class folders, Kaggle's download, TFRecords, ...; docs/data.md lists all)",
            "same_run": False,
        },
    )

    index_dir: str | None = field(
        default=None,
        metadata={
            "help": "with --data: folder for the index of WebDataset's tars, or of TFRecords without "
            "index files; it is made once (default: beside the data, or the cache if that is "
            "read-only)",
            "same_run": False,
        },
    )

    exact_pil = False
    shuffle_window = 1
    label_base: int | None = None

    @functools.cached_property
    def found(self) -> Found:
        """The images at ``--data``."""
        from data import layouts

        assert self.data is not None
        return layouts.find(self.data)

    @property
    def _options(self) -> Options:
        from data.layouts import Options

        return Options(self.exclude, self.shuffle_window, self.label_base, self.index_dir)

    @property
    def block(self) -> Blocks:
        """Training samples that are shuffled as one: those that the files keep together."""
        return getattr(self.samples[0], "block", 1)

    def refuse_useless_options(self) -> None:
        """Raise FlagError for a flag that has no effect on the layout of ``--data``."""
        flags = {
            "block": "shuffle_window",
            "label_base": "label_base",
            "index_dir": "index_dir",
        }
        useless = [flag for name, flag in flags.items() if name not in self.found.takes]
        refuse_unused(self, useless, f"on {self.found.title}")

    @property
    def description(self) -> str:
        """One line about what ``--data`` recognised, with counts; empty without the flag."""
        if self.data is None:
            return ""
        train, val = self._numbered
        return f"{self.data}: {self.found.line(None if train is val else train, val)}"

    def open_samples(self) -> tuple[ExcludableSamples, ExcludableSamples]:
        """Open what ``--data`` names, or scan both folders.

        Raises:
            DataError: They do not hold the same classes, or they cannot be used.
        """
        if self.data is not None:
            from data import layouts

            return layouts.open_both(self.found, self._options)
        from data.samples.exclude import read_excluded
        from data.samples.listing import first_few
        from data.samples.tree import scan

        train = scan(self.train_dir, "--train-dir", read_excluded(self.exclude, "train"))
        val = scan(self.val_dir, "--val-dir", read_excluded(self.exclude, "val"))
        if train.classes != val.classes:
            only_train = sorted(set(train.classes) - set(val.classes))
            only_val = sorted(set(val.classes) - set(train.classes))
            raise DataError(
                f"--train-dir {self.train_dir} and --val-dir {self.val_dir} must hold the same "
                "class folders; otherwise a label means different classes. "
                f"Only in train: {first_few(only_train)}; only in val: {first_few(only_val)}"
            )
        return train, val

    def open_val(self) -> ExcludableSamples:
        """Open the validation images."""
        if self.data is not None:
            from data import layouts

            return layouts.open_split(self.found, "val", self._options)
        from data.samples.exclude import read_excluded
        from data.samples.tree import scan

        return scan(self.val_dir, "--val-dir", read_excluded(self.exclude, "val"))

    @property
    def train_sizes(self) -> tuple[tuple[int, int], ...]:
        """Pairs of (first epoch from 1, side of the training images in pixels)."""
        if self.image_size_schedule is None:
            return super().train_sizes
        return parse_sizes(self.image_size_schedule)

    def crop_transform(self, size: int) -> TrainTransform:
        """Return a random crop of `size` pixels, perhaps mirrored."""
        from data.pixels.transforms import TrainTransform

        return TrainTransform(size, self.crop_area, self.crop_aspect, self.flip, self.exact_pil)

    def train_transform(self) -> Transform | ByEpoch:
        """Return a random crop, perhaps mirrored, and the augmentation."""
        from data.pixels.transforms import ByEpoch

        stages = [
            (epoch - 1, self.augmented(self.crop_transform(s))) for epoch, s in self.train_sizes
        ]
        return stages[0][1] if len(stages) == 1 else ByEpoch(tuple(stages))

    def val_transform(self) -> ValTransform:
        """Return the central square of the resized image."""
        from data.pixels.transforms import ValTransform

        return ValTransform(self._resize, self.image_size, self.exact_pil)

    @property
    def _resize(self) -> int:
        if self.val_resize is None:
            return round(self.image_size * 256 / 224)
        return self.val_resize

    def check(self) -> None:
        """Raise DataError for sizes, crops or folders that cannot be used."""
        check_crops(self.image_size, self._resize, self.crop_area, self.crop_aspect)
        if self.max_bad_images < 0:
            raise FlagError(f"--max-bad-images {self.max_bad_images} must be at least 0")
        _ = self.train_sizes
        if self.data is not None:
            refuse_unused(self, ["train_dir", "val_dir"], "with --data: leave one of them out")
        else:
            refuse_unused(self, ["index_dir"], "without --data")
        super().check()
        self.refuse_implausible()

    def refuse_implausible(self) -> None:
        """Raise DataError if these can hardly be the folders that the user means."""
        if self.data is not None:
            if self.num_classes < 2:
                raise DataError(
                    f"--data {self.data} holds {self.num_classes} class; a network needs at least "
                    "two classes"
                )
            return
        for flag, tree in zip(("--train-dir", "--val-dir"), self._trees, strict=True):
            if tree.oddities.implausible:
                raise DataError(f"{flag}: {tree.oddities.implausible}")

    @property
    def _trees(self) -> tuple[FileTree, FileTree]:
        return cast("tuple[FileTree, FileTree]", self.samples)

    @property
    def _numbered(self) -> tuple[NumberedSamples, NumberedSamples]:
        return cast("tuple[NumberedSamples, NumberedSamples]", self.samples)

    @property
    def warnings(self) -> list[str]:
        """What looks wrong about the images, and what was left out."""
        if self.data is not None:
            from data import layouts

            return list(layouts.layout(self.found.layout).warnings(self.found, *self.samples))
        from data.samples.tree import warnings_about

        folders = f"--train-dir {self.train_dir} and --val-dir {self.val_dir}"
        return warnings_about(*self._trees, f"{folders} hold")

    def train_loader(self, share: Share, workers: int) -> TrainLoader:
        """Make the training loader of one rank."""
        self._warn_about_unmatched(share.rank)
        return super().train_loader(share, workers)

    def _warn_about_unmatched(self, rank: int) -> None:
        """Warn, on the first rank, about names in --exclude that match no image."""
        from data.samples.listing import first_few

        train, val = cast("tuple[ExcludableSamples, ExcludableSamples]", self.samples)
        unmatched = [*train.unmatched, *val.unmatched]
        if rank == 0 and unmatched:
            print(
                f"warning: --exclude {self.exclude}: no image for {first_few(unmatched)}",
                file=sys.stderr,
            )


def check_crops(
    image_size: int,
    val_resize: int,
    crop_area: tuple[float, float],
    crop_aspect: tuple[float, float],
) -> None:
    """Raise FlagError, naming the flag, for impossible sizes and crops."""
    if image_size < 1:
        raise FlagError(f"--image-size {image_size} must be at least 1")
    if val_resize < image_size:
        raise FlagError(f"--val-resize {val_resize} must be at least --image-size {image_size}")
    if not 0 < crop_area[0] <= crop_area[1] <= 1:
        raise FlagError(
            f"--crop-area {crop_area[0]} {crop_area[1]}: "
            "give two fractions in (0, 1], the smaller first"
        )
    if not 0 < crop_aspect[0] <= crop_aspect[1] < math.inf:
        raise FlagError(
            f"--crop-aspect {crop_aspect[0]} {crop_aspect[1]}: "
            "give two positive ratios, the smaller first"
        )
