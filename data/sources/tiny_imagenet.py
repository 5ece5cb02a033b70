"""Tiny-ImageNet: 200 classes of 64x64 pixels, from the published zip or a pair of parquet files.

Importing this loads neither torch nor NumPy.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data import IMAGENET_MEAN, IMAGENET_STD, DataError
from data.folder import refuse_unused
from data.small_images import SmallImages

if TYPE_CHECKING:
    from data.loading import CountedSamples


@dataclass(frozen=True)
class TinyImageNet(SmallImages):
    """Tiny-ImageNet (Stanford's CS231n); the contract is in `data`."""

    archive: str = field(
        default="tiny-imagenet-200.zip",
        metadata={
            "help": "tiny-imagenet-200.zip, from http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            "same_run": False,
        },
    )
    train_parquet: str | None = field(
        default=None,
        metadata={
            "help": "instead of the archive, with --val-parquet: the training file of the parquet "
            "pair (columns image and label), published as zh-plus/tiny-imagenet",
            "same_run": False,
        },
    )
    val_parquet: str | None = field(
        default=None,
        metadata={"help": "the validation file of the parquet pair", "same_run": False},
    )

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return 64

    def check(self) -> None:
        """Raise DataError for flags or files that are not usable."""
        if bool(self.train_parquet) != bool(self.val_parquet):
            raise DataError("--train-parquet and --val-parquet go together")
        if self.train_parquet:
            refuse_unused(self, ["archive"], "beside --train-parquet: leave one of them out")
        super().check()

    def _load(self) -> tuple[CountedSamples, CountedSamples]:
        if self.train_parquet and self.val_parquet:
            train = _parquet(self.train_parquet, "--train-parquet")
            return train, _parquet(self.val_parquet, "--val-parquet", train.num_classes)
        try:
            with zipfile.ZipFile(self.archive) as archive:
                return _from_zip(archive)
        except Exception as error:  # a damaged zip can raise anything
            raise DataError(
                f"--archive: {self.archive} cannot be read ({error}); get it from "
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
            ) from error


def _from_zip(archive: zipfile.ZipFile) -> tuple[CountedSamples, CountedSamples]:
    """Read train/<class>/images/*, val/images/* and val/val_annotations.txt of the zip."""
    import numpy as np

    from data.memory import EncodedFiles

    names = sorted(name for name in archive.namelist() if name.lower().endswith(".jpeg"))
    train = [name for name in names if "/train/" in name]
    val = [name for name in names if "/val/images/" in name]
    classes = sorted({name.split("/train/")[1].split("/")[0] for name in train})
    if not classes or not val:
        raise ValueError("it holds no training or no validation images")
    number = {name: i for i, name in enumerate(classes)}
    root = val[0].split("/val/images/")[0]
    lines = archive.read(f"{root}/val/val_annotations.txt").decode().splitlines()
    class_of = dict(line.split("\t")[:2] for line in lines)

    def files(names: list[str], labels: list[int]) -> EncodedFiles:
        images = [(name, archive.read(name)) for name in names]
        return EncodedFiles(images, np.array(labels), len(classes))

    return (
        files(train, [number[name.split("/train/")[1].split("/")[0]] for name in train]),
        files(val, [number[class_of[name.rsplit("/", 1)[1]]] for name in val]),
    )


def _parquet(path: str, flag: str, num_classes: int | None = None) -> CountedSamples:

    from data.memory import EncodedFiles

    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{flag} needs pyarrow: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.read_table(path, columns=["image", "label"])
        labels = table.column("label").to_numpy()
        images = [
            (f"{path}, image {i}", image["bytes"])
            for i, image in enumerate(table.column("image").to_pylist())
        ]
        if not images:
            raise ValueError("it holds no images")
        return EncodedFiles(images, labels, num_classes or int(labels.max()) + 1)
    except Exception as error:  # other columns, or damage, can raise anything
        raise DataError(
            f"{flag}: {path} cannot be read ({error}); get it again, as zh-plus/tiny-imagenet is published"
        ) from error
