"""ImageNet from image folders or from TFRecords: the source of train_imagenet.py.

Importing it loads neither torch nor NumPy.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data import DataError
from data.folder import ImageFolders

if TYPE_CHECKING:
    from data.loading import CountedSamples


@dataclass(frozen=True)
class ImageNet(ImageFolders):
    """`ImageFolders`, or with ``--records`` the same images, pixels and order from TFRecords.

    Records need one read each instead of opening a file, which is what parallel file systems like.
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
            "python -m data.make_tfrecords) instead of --train-dir and --val-dir"
        },
    )
    shuffle_window: int = field(
        default=1,
        metadata={
            "help": "with --records: read this many consecutive records in one piece and shuffle "
            "the pieces; 1 shuffles every record by itself"
        },
    )

    def _record_set(self, split: str, block: int) -> CountedSamples:
        from data.records import RecordSet, class_count, shard_files
        from data.tree import read_excluded

        assert self.records is not None
        try:
            files = shard_files(self.records, split)
            excluded = read_excluded(self.exclude, split)
            return RecordSet(files, class_count(self.records), block, excluded)
        except DataError as error:
            raise DataError(f"--records: {error}") from error

    @functools.cached_property
    def _train(self) -> CountedSamples:
        if self.records is None:
            return super()._train
        return self._record_set("train", self.shuffle_window)

    @functools.cached_property
    def _val(self) -> CountedSamples:
        if self.records is None:
            return super()._val
        return self._record_set("validation", 1)

    @property
    def _block(self) -> int:
        return 1 if self.records is None else self.shuffle_window

    def _check_samples(self) -> None:
        if self.shuffle_window < 1:
            raise DataError(f"--shuffle-window {self.shuffle_window} must be 1 at least")
        if self.records is None:
            super()._check_samples()
        elif not (len(self._train) and len(self._val)):
            raise DataError(f"--records: {self.records} holds no records of one of the splits")
