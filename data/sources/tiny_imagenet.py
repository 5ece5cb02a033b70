"""Tiny-ImageNet: 200 classes of 64x64 pixels, from the published zip or a pair of parquet files.

Importing this loads neither torch nor NumPy.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data import DataError, FlagError
from data.sources.base import refuse_unused
from data.sources.small_images import SmallImages

if TYPE_CHECKING:
    from data.samples.arrays import EncodedFiles

_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


@dataclass(frozen=True)
class TinyImageNet(SmallImages):
    """Tiny-ImageNet (Stanford's CS231n), normalised with ImageNet's statistics."""

    archive: str = field(
        default="tiny-imagenet-200.zip",
        metadata={
            "help": f"tiny-imagenet-200.zip, from {_URL}",
            "same_run": False,
        },
    )
    train_parquet: str | None = field(
        default=None,
        metadata={
            "help": "use this instead of the archive, together with --val-parquet: the training "
            "file of the pair of parquet files (columns image and label) that is published as "
            "zh-plus/tiny-imagenet",
            "same_run": False,
        },
    )
    val_parquet: str | None = field(
        default=None,
        metadata={"help": "the validation file of the parquet pair", "same_run": False},
    )

    image_size = 64

    def check(self) -> None:
        """Raise DataError for flags or files that cannot be used."""
        if bool(self.train_parquet) != bool(self.val_parquet):
            raise FlagError("give both --train-parquet and --val-parquet, or neither")
        if self.train_parquet:
            refuse_unused(self, ["archive"], "with --train-parquet: leave one of them out")
        super().check()

    @property
    def warnings(self) -> list[str]:
        """Whether both parquet files are the same one."""
        train, val = self.train_parquet, self.val_parquet
        if train and val and os.path.samefile(train, val):
            return [
                "--train-parquet and --val-parquet are the same file, so validation says nothing "
                "about new images"
            ]
        return []

    def open_samples(self) -> tuple[EncodedFiles, EncodedFiles]:
        """Read the archive or the parquet files."""
        if self.train_parquet and self.val_parquet:
            train = _parquet(self.train_parquet, "--train-parquet")
            return train, _parquet(self.val_parquet, "--val-parquet", train.num_classes)
        try:
            with zipfile.ZipFile(self.archive) as archive:
                return _from_zip(archive)
        except Exception as error:  # a damaged zip can raise anything
            raise DataError(
                f"--archive: {self.archive} cannot be read ({error}); download it from {_URL}"
            ) from error


def _from_zip(archive: zipfile.ZipFile) -> tuple[EncodedFiles, EncodedFiles]:
    """Read train/<class>/images/*, val/images/* and val/val_annotations.txt of the zip."""
    import numpy as np

    from data.samples.arrays import EncodedFiles
    from data.samples.listing import is_foreign

    names = sorted(
        name
        for name in archive.namelist()
        if name.lower().endswith(".jpeg") and not any(map(is_foreign, name.split("/")))
    )
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
        return EncodedFiles(images, np.array(labels), len(classes), classes)

    return (
        files(train, [number[name.split("/train/")[1].split("/")[0]] for name in train]),
        files(val, [number[class_of[name.rsplit("/", 1)[1]]] for name in val]),
    )


def _parquet(path: str, flag: str, num_classes: int | None = None) -> EncodedFiles:
    from data.samples.arrays import EncodedFiles
    from data.samples.parquet_files import class_names_of, import_parquet

    parquet = import_parquet()
    try:
        table = parquet.read_table(path, columns=["image", "label"])
        labels = table.column("label").to_numpy()
        images = [
            (f"{path}, image {i}", image["bytes"])
            for i, image in enumerate(table.column("image").to_pylist())
        ]
        if not images:
            raise ValueError("it holds no images")
        names = class_names_of(table.schema.metadata)
        num_classes = num_classes or len(names) or int(labels.max()) + 1
        return EncodedFiles(images, labels, num_classes, names)
    except Exception as error:  # missing columns or damage can raise anything
        raise DataError(
            f"{flag}: {path} cannot be read ({error}); download it again (published as zh-plus/tiny-imagenet)"
        ) from error
