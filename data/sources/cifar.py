"""CIFAR-10 and CIFAR-100, read from the archives as their publisher has them.

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
from data.small_images import SmallImages

if TYPE_CHECKING:
    from data.loading import CountedSamples

# Of the training images, in units of 0..255; CIFAR-10's standard deviation is the mean over images,
# as in the figures that large-batch studies on CIFAR share.
_MEAN = {10: (0.4914, 0.4822, 0.4465), 100: (0.5071, 0.4867, 0.4408)}
_STD = {10: (0.2023, 0.1994, 0.2010), 100: (0.2675, 0.2565, 0.2761)}

_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"

_CIFAR10 = {"test_batch", *(f"data_batch_{number}" for number in range(1, 6))}

_PIECE = 2**20  # bytes

# What the published pickles are made of, under NumPy's old and new names. Nothing else is loaded:
# a pickle can run any function that it can name.
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
            raise DataError(f"a pickle asks for {module}.{name}, which no CIFAR archive holds")
        return super().find_class(module, name)


@dataclass(frozen=True)
class Cifar(SmallImages):
    """CIFAR-10 or CIFAR-100 (Krizhevsky, 2009); the contract is in `data`."""

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

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return 32

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

    def _load(self) -> tuple[CountedSamples, CountedSamples]:
        import numpy as np

        from data.memory import ArraySamples

        batches = self._batches()
        if _CIFAR10 & set(batches):
            classes, key, val = 10, b"labels", ["test_batch"]
            train = sorted(_CIFAR10 - {"test_batch"})
            missing = sorted(_CIFAR10 - set(batches))
            if missing:
                raise DataError(
                    f"--archive: {self.archive} lacks {', '.join(missing)}; get it again from {_PAGE}"
                )
        elif {"train", "test"} <= set(batches):
            classes, key, train, val = 100, b"fine_labels", ["train"], ["test"]
        else:
            raise DataError(
                f"--archive: {self.archive} holds neither CIFAR-10 nor CIFAR-100; get it from {_PAGE}"
            )

        def samples(names: list[str]) -> ArraySamples:
            try:
                pixels = np.concatenate([batches[name][b"data"] for name in names])
                labels = np.concatenate([np.array(batches[name][key]) for name in names])
                images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                return ArraySamples(images, labels, classes)
            except Exception as error:  # what was unpickled can be anything
                raise DataError(
                    f"--archive: {self.archive} is damaged: {error}; get it again from {_PAGE}"
                ) from error

        return samples(train), samples(val)

    def _batches(self) -> dict[str, dict[bytes, Any]]:
        """Return the dictionaries in the archive by file name."""
        wanted = _CIFAR10 | {"train", "test"}
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
                while tar.fileobj.read(_PIECE):  # to the end, where the archive's checksum is
                    pass
        except DataError as error:
            raise DataError(f"--archive: {self.archive}: {error}") from error
        except Exception as error:  # a damaged pickle can raise anything
            raise DataError(
                f"--archive: {self.archive} cannot be read ({error}); get it from {_PAGE}"
            ) from error
        return found
