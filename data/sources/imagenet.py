"""The sources of the two training scripts: ImageNet read by our own loader, and by DALI.

Importing this loads neither torch nor NumPy nor DALI.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from data import DataError, FlagError, Share, TrainLoader, ValLoader
from data.sources.augmented import PIXEL_FLAGS
from data.sources.base import refuse_unused
from data.sources.folder import ImageFolders

if TYPE_CHECKING:
    from data.loader.dali_graph import TrainGeometry
    from data.samples import EncodedSamples, ExcludableSamples
    from data.samples.records import RecordSet

_LABEL_BASE = {
    "help": "label of the first class in TFRecords, parquet files or WebDataset's tars, 0 or 1 "
    "(default: what the manifest of records says; without one, 1 for image/class/label, and 0 for "
    "the label of all others)",
    "choices": (0, 1),
    "same_run": False,  # it is part of the fingerprint
}


@dataclass(frozen=True)
class ImageNet(ImageFolders):
    """`ImageFolders`, or with ``--records`` the same images and pixels from TFRecords.

    Records are numbered in the order in which they were written, which is shuffled. Reading one
    takes a single read instead of opening a file; parallel file systems are faster with that.
    This is the source of train_imagenet.py.
    """

    exact_pil: bool = field(
        default=False,
        metadata={
            "help": "resize with PIL, which gives exactly the pixels of torchvision's PIL "
            "transforms (they differ by at most 1/255); slower"
        },
    )
    records: str | None = field(
        default=None,
        metadata={
            "help": "read TFRecords under this folder (train, validation, idx_files; made by "
            "python -m data.make_tfrecords) instead of --train-dir and --val-dir",
            "same_run": False,
        },
    )
    shuffle_window: int = field(
        default=1,
        metadata={
            "help": "TFRecords: read this many consecutive records in one piece and shuffle "
            "the pieces; 1 shuffles single records"
        },
    )

    label_base: int | None = field(default=None, metadata=_LABEL_BASE)

    def open_samples(self) -> tuple[ExcludableSamples, ExcludableSamples]:
        """Open the folders or the records."""
        if self.records is None:
            return super().open_samples()
        return _open_records(
            self.records, "--records", self.exclude, self.shuffle_window, self.label_base
        )

    def open_val(self) -> ExcludableSamples:
        """Open the validation folder or the validation records."""
        if self.records is None:
            return super().open_val()
        return _open_val_records(self.records, "--records", self.exclude, self.label_base)

    def refuse_implausible(self) -> None:
        """Raise DataError if these can hardly be the images that the user means."""
        if self.records is None:
            super().refuse_implausible()
        else:
            _refuse_one_class(self.records, "--records", self.num_classes)

    @property
    def warnings(self) -> list[str]:
        """What looks wrong about the images, and what was left out."""
        if self.records is None:
            return super().warnings
        from data.samples.record_files import record_warnings

        return record_warnings(self.records, self.train_size)

    def check(self) -> None:
        """Raise DataError for flags or files that cannot be used."""
        if self.shuffle_window < 1:
            raise FlagError(f"--shuffle-window {self.shuffle_window} must be at least 1")
        if self.data is not None:
            refuse_unused(self, ["records"], "with --data: leave one of them out")
            self.refuse_useless_options()
        elif self.records is None:
            refuse_unused(self, ["shuffle_window", "label_base"], "without --data or --records")
        else:
            refuse_unused(self, ["train_dir", "val_dir"], "with --records: leave one of them out")
        super().check()


@dataclass(frozen=True)
class ImageNetDali(ImageFolders):
    """The same images in the same order with the same boxes, decoded and resized by DALI.

    DALI reads TFRecords or image folders. This is the source of train_imagenet_dali.py.
    """

    reader: str = field(
        default="tfrecord",
        metadata={
            "help": "TFRecords under --data-dir, or image folders (--train-dir, --val-dir)",
            "choices": ("tfrecord", "folder"),
        },
    )
    data_dir: str = field(
        default=os.path.join(tempfile.gettempdir(), "imagenet"),
        metadata={
            "help": "folder of TFRecords: train/*, validation/*, idx_files/train/*, "
            "idx_files/validation/*; made by python -m data.make_tfrecords",
            "same_run": False,
        },
    )
    antialias: bool = field(
        default=True,
        metadata={
            "help": "when shrinking, average over all pixels, as train_imagenet.py and the published "
            "DALI script do; without it, each pixel comes from four neighbours only"
        },
    )
    label_base: int | None = field(default=None, metadata=_LABEL_BASE)

    @property
    def _has_no_data_dir(self) -> bool:
        return self.data is not None or self.reader == "folder"

    def open_samples(self) -> tuple[ExcludableSamples, ExcludableSamples]:
        """Open the folders or the records."""
        if self._has_no_data_dir:
            return super().open_samples()
        return _open_records(self.data_dir, "--data-dir", self.exclude, label_base=self.label_base)

    def open_val(self) -> ExcludableSamples:
        """Open the validation folder or the validation records."""
        if self._has_no_data_dir:
            return super().open_val()
        return _open_val_records(self.data_dir, "--data-dir", self.exclude, self.label_base)

    def refuse_implausible(self) -> None:
        """Raise DataError if these can hardly be the images that the user means."""
        if self._has_no_data_dir:
            super().refuse_implausible()
        else:
            _refuse_one_class(self.data_dir, "--data-dir", self.num_classes)

    @property
    def warnings(self) -> list[str]:
        """What looks wrong about the images, and what was left out."""
        if self._has_no_data_dir:
            return super().warnings
        from data.samples.record_files import record_warnings

        return record_warnings(self.data_dir, self.train_size)

    def check(self) -> None:
        """Raise DataError for flags or files that cannot be used, or if DALI is missing."""
        try:
            import nvidia.dali.fn  # noqa: F401
        except ImportError as error:
            raise DataError(
                f"DALI cannot be imported ({error}); run ./launch/setup.sh --dali "
                "(2.0 or newer), or use train_imagenet.py, which does not need it"
            ) from error
        if self.data is not None:
            refuse_unused(self, ["reader", "data_dir"], "with --data: leave one of them out")
            self.refuse_useless_options()
        elif self.reader == "folder":
            refuse_unused(self, ["data_dir"], "with --reader folder: leave one of them out")
            refuse_unused(self, ["label_base"], "with --reader folder")
        else:
            refuse_unused(
                self,
                ["train_dir", "val_dir"],
                "with --reader tfrecord: leave it out, or give --reader folder",
            )
        refuse_unused(self, PIXEL_FLAGS, "with DALI; leave it out, or use train_imagenet.py")
        super().check()

    def start_workers(self, workers: int) -> None:
        """Do nothing: DALI has threads, not processes."""

    def train_loader(self, share: Share, workers: int) -> TrainLoader:
        """Make the training loader of one rank; `workers` is the number of threads, at least 1."""
        from data.loader.dali import DaliTrainLoader

        self._warn_about_unmatched(share.rank)
        return DaliTrainLoader(
            cast("EncodedSamples", self.samples[0]),
            self._geometry_in,
            share,
            self.repeated_aug,
            block=self.block,
            threads=workers,
            on_bad_image=self.on_bad_image,
            max_bad_images=self.max_bad_images,
        )

    def _geometry_in(self, epoch: int) -> TrainGeometry:
        from data.loader.dali_graph import TrainGeometry
        from data.pixels.transforms import TrainTransform, in_epoch

        transform = in_epoch(self.train_transform(), epoch)
        return TrainGeometry(cast("TrainTransform", transform), self.antialias)

    def val_loader(self, share: Share, workers: int) -> ValLoader:
        """Make the validation loader of one rank."""
        from data.loader.dali import DaliValLoader
        from data.loader.dali_graph import ValGeometry

        return DaliValLoader(
            cast("EncodedSamples", self.samples[1]),
            ValGeometry(self.val_transform(), self.antialias),
            share,
            threads=workers,
            on_bad_image=self.on_bad_val_image,
            max_bad_images=self.max_bad_images,
        )


def _open_records(
    folder: str, flag: str, exclude: str | None, block: int = 1, label_base: int | None = None
) -> tuple[RecordSet, RecordSet]:
    from data.samples.records import open_records

    train = open_records(folder, "train", flag, exclude, block, label_base)
    return train, _open_val_records(folder, flag, exclude, label_base)


def _open_val_records(
    folder: str, flag: str, exclude: str | None, label_base: int | None
) -> RecordSet:
    from data.samples.records import open_records

    return open_records(folder, "validation", flag, exclude, label_base=label_base)


def _refuse_one_class(folder: str, flag: str, num_classes: int) -> None:
    if num_classes < 2:
        raise DataError(
            f"{flag}: {folder} holds {num_classes} class; a network needs at least two classes"
        )
