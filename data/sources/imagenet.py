"""The sources of the two training scripts: ImageNet by our own loader, and by DALI.

Importing this loads neither torch nor NumPy nor DALI.
"""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from data import DataError, TrainLoader, ValLoader
from data.folder import ImageFolders, refuse_unused

if TYPE_CHECKING:
    from data.dali import EncodedSamples
    from data.loading import ListedSamples


@dataclass(frozen=True)
class ImageNet(ImageFolders):
    """`ImageFolders`, or with ``--records`` the same images and pixels from TFRecords.

    Records are numbered as they were written, in a shuffled order. They need one read each instead of opening a file,
    which is what parallel file systems like.
    The source of train_imagenet.py.
    """

    exact_pil: bool = field(
        default=False,
        metadata={
            "help": "resize with PIL, for the very pixels of torchvision's PIL transforms "
            "(they differ by 1/255 at most); slower"
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
            "help": "with --records: read this many consecutive records in one piece and shuffle "
            "the pieces; 1 shuffles every record by itself"
        },
    )

    @functools.cached_property
    def _train(self) -> ListedSamples:
        if self.records is None:
            return super()._train
        return _records(self.records, "train", "--records", self.exclude, self.shuffle_window)

    @functools.cached_property
    def _val(self) -> ListedSamples:
        if self.records is None:
            return super()._val
        return _records(self.records, "validation", "--records", self.exclude)

    @property
    def _block(self) -> int:
        return 1 if self.records is None else self.shuffle_window

    def _check_samples(self) -> None:
        if self.shuffle_window < 1:
            raise DataError(f"--shuffle-window {self.shuffle_window} must be 1 at least")
        if self.records is None:
            refuse_unused(self, ["shuffle_window"], "without --records")
            super()._check_samples()
        else:
            refuse_unused(self, ["train_dir", "val_dir"], "beside --records: leave one of them out")
            _ = self._train, self._val


@dataclass(frozen=True)
class ImageNetDali(ImageFolders):
    """The same images in the same order with the same boxes, decoded and resized by DALI.

    From TFRecords or image folders. The source of train_imagenet_dali.py.
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
        metadata={"help": "when shrinking, average over all pixels, as train_imagenet.py does"},
    )

    @functools.cached_property
    def _train(self) -> ListedSamples:
        if self.reader == "folder":
            return super()._train
        return _records(self.data_dir, "train", "--data-dir", self.exclude)

    @functools.cached_property
    def _val(self) -> ListedSamples:
        if self.reader == "folder":
            return super()._val
        return _records(self.data_dir, "validation", "--data-dir", self.exclude)

    def start_workers(self) -> None:
        """Do nothing: DALI has threads, not processes."""

    def _check_samples(self) -> None:
        try:
            import nvidia.dali.fn  # noqa: F401
        except ImportError as error:
            raise DataError(
                f"DALI cannot be imported ({error}); run ./launch/setup.sh --dali "
                "(2.0 or newer), or use train_imagenet.py, which needs none"
            ) from error
        if self.reader == "folder":
            refuse_unused(self, ["data_dir"], "beside --reader folder: leave one of them out")
            super()._check_samples()
        else:
            refuse_unused(
                self,
                ["train_dir", "val_dir"],
                "beside --reader tfrecord: leave it out, or give --reader folder",
            )
            _ = self._train, self._val

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
        """Make the training loader of one rank; `workers` are threads, one at least."""
        from data import dali
        from data.sampler import Order

        self._mention_unmatched(rank)
        order = Order(self.train_size, batch_size, effective_batch_size, drop_last, seed)
        return dali.DaliTrainLoader(
            cast("EncodedSamples", self._train),
            dali.TrainGeometry(self._train_transform(), self.antialias),
            order,
            rank,
            size,
            threads=workers,
            on_bad_image=self.on_bad_image,
            max_bad_images=self.max_bad_images,
        )

    def val_loader(self, *, batch_size: int, rank: int, size: int, workers: int) -> ValLoader:
        """Make the validation loader of one rank."""
        from data import dali

        return dali.DaliValLoader(
            cast("EncodedSamples", self._val),
            dali.ValGeometry(self._val_transform(), self.antialias),
            batch_size,
            rank,
            size,
            threads=workers,
            on_bad_image=self._on_bad_val_image,
            max_bad_images=self.max_bad_images,
        )


def _records(
    folder: str, split: str, flag: str, exclude: str | None, block: int = 1
) -> ListedSamples:
    from data.records import open_records

    return open_records(folder, split, flag, exclude, block)
