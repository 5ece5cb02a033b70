"""MNIST and data sets in its format, such as Fashion-MNIST: four idx files, gzipped or not.

Importing this loads neither torch nor NumPy.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data import DataError
from data.sources.small_images import SmallImages

if TYPE_CHECKING:
    from data.samples.arrays import ArraySamples

_FIX = "download the four files again, as MNIST or Fashion-MNIST is published"

_SIDE, _CLASSES = 28, 10
_NAMES = [str(digit) for digit in range(_CLASSES)]  # Fashion-MNIST's files have no names either

# An idx file begins with two zero bytes, the type of its numbers (8: unsigned bytes) and the number
# of dimensions; each dimension follows as a big-endian 32-bit integer.
_UNSIGNED_BYTES = 8


@dataclass(frozen=True)
class Mnist(SmallImages):
    """MNIST (LeCun et al., 1998) or Fashion-MNIST: 28x28 pixels, grey in three equal channels.

    MNIST's mean and standard deviation are used for both. Fashion-MNIST's are 73 and 90, a
    difference that the network's first normalisation layer absorbs.
    """

    data_dir: str = field(
        default="mnist",
        metadata={
            "help": "folder of the four files train-images-idx3-ubyte, train-labels-idx1-ubyte, "
            "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each with or without .gz",
            "same_run": False,
        },
    )
    flip: bool = field(
        default=False, metadata={"help": "training: mirror half of the images, at random"}
    )

    image_size = _SIDE
    mean = (0.1307 * 255,) * 3
    std = (0.3081 * 255,) * 3

    def open_samples(self) -> tuple[ArraySamples, ArraySamples]:
        """Read the four files."""
        return _read_split(self.data_dir, "train"), _read_split(self.data_dir, "t10k")


def _read_split(folder: str, split: str) -> ArraySamples:
    import numpy as np

    from data.samples.arrays import ArraySamples

    path, (count, height, width), pixels = _read_idx(folder, f"{split}-images-idx3-ubyte", 3)
    if (height, width) != (_SIDE, _SIDE):
        raise _bad(path, f"holds images of {height}x{width} pixels, not {_SIDE}x{_SIDE}")
    if not count:
        raise _bad(path, "holds no images")
    labels_path, (labels_count,), labels = _read_idx(folder, f"{split}-labels-idx1-ubyte", 1)
    if labels_count != count:
        raise _bad(labels_path, f"holds {labels_count} labels, but {path} holds {count} images")
    grey = np.frombuffer(pixels, np.uint8).reshape(count, _SIDE, _SIDE, 1)
    try:
        return ArraySamples(
            np.repeat(grey, 3, axis=3),
            np.frombuffer(labels, np.uint8).astype(np.int64),
            _CLASSES,
            _NAMES,
        )
    except DataError as error:
        raise _bad(labels_path, f"is damaged: {error}") from error


def _read_idx(folder: str, name: str, dimensions: int) -> tuple[str, tuple[int, ...], bytes]:
    """Return (path, sizes of the dimensions, values) of an idx file of unsigned bytes."""
    path = os.path.join(folder, name)
    if not os.path.exists(path) and os.path.exists(f"{path}.gz"):
        path = f"{path}.gz"
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError as error:
        raise _bad(path, "does not exist, with or without .gz") from error
    except (OSError, EOFError, zlib.error) as error:
        raise _bad(path, f"cannot be read ({error})") from error
    magic = bytes((0, 0, _UNSIGNED_BYTES, dimensions))
    header = len(magic) + 4 * dimensions
    if content[:4] != magic or len(content) < header:
        raise _bad(path, f"does not begin as an idx file of {dimensions} dimensions")
    sizes = struct.unpack(f">{dimensions}I", content[4:header])
    expected = 1
    for size in sizes:
        expected *= size
    if len(content) - header != expected:
        raise _bad(path, f"holds {len(content) - header} bytes of data instead of {expected}")
    return path, sizes, content[header:]


def _bad(path: str, problem: str) -> DataError:
    return DataError(f"--data-dir: {path} {problem}; {_FIX}")
