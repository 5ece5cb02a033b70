"""CIFAR-10 and CIFAR-100, read from the published archives.

Importing this loads neither torch nor NumPy.
"""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from data import IMAGENET_MEAN, IMAGENET_STD, DataError
from data.sources.small_images import SmallImages

if TYPE_CHECKING:
    from data.samples.arrays import ArraySamples

# Statistics of the training images, in units of 0..1. CIFAR-10's standard deviation is the mean of
# the images' standard deviations; large-batch studies on CIFAR commonly use these values.
_MEAN = {10: (0.4914, 0.4822, 0.4465), 100: (0.5071, 0.4867, 0.4408)}
_STD = {10: (0.2023, 0.1994, 0.2010), 100: (0.2675, 0.2565, 0.2761)}

_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"

_CIFAR10 = {"test_batch", *(f"data_batch_{number}" for number in range(1, 6))}

# The file that holds the names of the classes, and their key in it.
_METADATA = {10: ("batches.meta", b"label_names"), 100: ("meta", b"fine_label_names")}

_PIECE = 2**20  # bytes

# The published pickles consist of these, under NumPy's old and new names. Nothing else is loaded,
# because a pickle can run any function that it can name.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise DataError(f"a pickle asks for {module}.{name}, which no CIFAR archive contains")
        return super().find_class(module, name)


@dataclass(frozen=True)
class Cifar(SmallImages):
    """CIFAR-10 or CIFAR-100 (Krizhevsky, 2009), whichever the archive holds."""

    archive: str = field(
        default="cifar-10-python.tar.gz",
        metadata={
            "help": f"cifar-10-python.tar.gz or cifar-100-python.tar.gz, from {_PAGE}",
            "same_run": False,
        },
    )
    imagenet_statistics: bool = field(
        default=False,
        metadata={"help": "normalise with ImageNet's mean and standard deviation"},
    )

    image_size = 32
    only_classes = 0  # 10 or 100 to accept only that one of the two data sets; 0 for either

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of each channel in units of 0..255."""
        if self.imagenet_statistics:
            return IMAGENET_MEAN
        red, green, blue = _MEAN[self.num_classes]
        return red * 255, green * 255, blue * 255

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of each channel in units of 0..255."""
        if self.imagenet_statistics:
            return IMAGENET_STD
        red, green, blue = _STD[self.num_classes]
        return red * 255, green * 255, blue * 255

    def open_samples(self) -> tuple[ArraySamples, ArraySamples]:
        """Read the archive."""
        batches = self._batches()
        if _CIFAR10 & set(batches):
            classes, labels, val = 10, b"labels", ["test_batch"]
            train = sorted(_CIFAR10 - {"test_batch"})
            missing = sorted(_CIFAR10 - set(batches))
            if missing:
                raise DataError(
                    f"--archive: {self.archive} lacks {', '.join(missing)}; "
                    f"download it again from {_PAGE}"
                )
        elif {"train", "test"} <= set(batches):
            classes, labels, train, val = 100, b"fine_labels", ["train"], ["test"]
        else:
            raise DataError(
                f"--archive: {self.archive} holds neither CIFAR-10 nor CIFAR-100; "
                f"download it from {_PAGE}"
            )
        if self.only_classes not in (0, classes):
            raise DataError(
                f"--archive: {self.archive} holds CIFAR-{classes}, not CIFAR-{self.only_classes}; "
                f"download cifar-{self.only_classes}-python.tar.gz from {_PAGE}"
            )
        try:
            names = _class_names(batches, classes)
            return (
                _array_samples([batches[name] for name in train], labels, classes, names),
                _array_samples([batches[name] for name in val], labels, classes, names),
            )
        except Exception as error:  # unpickled objects can be anything
            raise DataError(
                f"--archive: {self.archive} is damaged: {error}; download it again from {_PAGE}"
            ) from error

    def _batches(self) -> dict[str, dict[bytes, Any]]:
        """Return the dictionaries in the archive by file name."""
        wanted = _CIFAR10 | {"train", "test"} | {file for file, _ in _METADATA.values()}
        found = {}
        try:
            with tarfile.open(self.archive) as tar:
                for member in tar:
                    name = os.path.basename(member.name)
                    file = tar.extractfile(member) if member.isfile() else None
                    if file is not None and name in wanted:
                        unpickler = _Unpickler(io.BytesIO(file.read()), encoding="bytes")
                        found[name] = unpickler.load()
                assert tar.fileobj is not None
                while tar.fileobj.read(_PIECE):  # read to the end, which verifies gzip's checksum
                    pass
        except DataError as error:
            raise DataError(f"--archive: {self.archive}: {error}") from error
        except Exception as error:  # a damaged pickle can raise anything
            raise DataError(
                f"--archive: {self.archive} cannot be read ({error}); download it from {_PAGE}"
            ) from error
        return found


def _class_names(files: dict[str, dict[bytes, Any]], classes: int) -> list[str]:
    """Return the names in the archive's file of metadata; [] without it."""
    file, key = _METADATA[classes]
    names = [name.decode() for name in files.get(file, {}).get(key, [])]
    return names if len(names) == classes else []


def _array_samples(
    batches: list[dict[bytes, Any]], labels: bytes, classes: int, names: list[str]
) -> ArraySamples:
    import numpy as np

    from data.samples.arrays import ArraySamples

    pixels = np.concatenate([batch[b"data"] for batch in batches])
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    numbers = np.concatenate([np.array(batch[labels]) for batch in batches])
    return ArraySamples(images, numbers, classes, names)


@dataclass(frozen=True)
class Cifar10(Cifar):
    """CIFAR-10 only."""

    only_classes = 10


@dataclass(frozen=True)
class Cifar100(Cifar):
    """CIFAR-100 only, with its fine labels."""

    archive: str = field(
        default="cifar-100-python.tar.gz",
        metadata={"help": f"cifar-100-python.tar.gz, from {_PAGE}", "same_run": False},
    )

    only_classes = 100
