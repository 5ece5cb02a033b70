"""The embedded data set: scikit-learn's handwritten digits as JPEG folders in ImageNet's layout.

    python -m data.digits DIR

writes DIR/train/<class>/*.jpg (1,437 images) and DIR/val/<class>/*.jpg (360). They are real data,
read through the real decoding path, with nothing to download. The digits (Alpaydin and Kaynak, UCI,
1998; 8x8 pixels, 17 grey levels) are enlarged to 32x32 pixels and saved at quality 95.

The images are sorted by class, and every fifth one goes to validation, so both splits have the same
proportions of classes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data import DataError
from data.tooling import cli
from data.tooling.atomic import new_folder, sweep_beside

if TYPE_CHECKING:
    from PIL.Image import Image

    from data.tooling.pool import Pool

SIDE = 32
QUALITY = 95
COUNTS = {"train": 1437, "val": 360}


@dataclass(frozen=True)
class Digit:
    """One image of the data set.

    Attributes:
        split: ``train`` or ``val``.
        number: Number of the image in scikit-learn's order.
        label: The digit.
        image: RGB, 32x32 pixels.
    """

    split: str
    number: int
    label: int
    image: Image


def enlarged_digits() -> list[Digit]:
    """Return all digits, sorted by class, with their split."""
    import numpy as np
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.argsort(bunch.target, kind="stable")
    return [
        Digit(
            "val" if position % 5 == 0 else "train",
            number,
            int(bunch.target[number]),
            _enlarged(bunch.images[number]),
        )
        for position, number in enumerate(order.tolist())
    ]


def write_digits(folder: str) -> bool:
    """Write the data set to `folder`, either completely or not at all.

    Returns:
        True if it was written, False if it already existed.

    Raises:
        DataError: `folder` exists and is not a complete copy of the data set.
    """
    folder = os.path.abspath(folder)
    sweep_beside(folder)
    if os.path.lexists(folder):
        if _complete(folder):
            return False
        raise DataError(
            f"{folder} exists but is not a complete copy of this data set; remove it or "
            "name another folder"
        )
    try:
        with new_folder(folder) as unfinished:
            _write_images(unfinished)
    except OSError:
        if _complete(folder):  # another process was faster
            return False
        raise
    return True


def _write_images(folder: str) -> None:
    for digit in enlarged_digits():
        class_folder = os.path.join(folder, digit.split, str(digit.label))
        os.makedirs(class_folder, exist_ok=True)
        path = os.path.join(class_folder, f"{digit.number:04d}.jpg")
        digit.image.save(path, quality=QUALITY)


def _enlarged(digit: Any) -> Image:
    """Return an 8x8 array of 0 .. 16 as an image."""
    import numpy as np
    from PIL import Image

    grey = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8))
    return grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")


def _complete(folder: str) -> bool:
    """Whether all images are there and none is empty (as after a crash of the machine)."""
    return all(
        sum(
            entry.stat().st_size > 0
            for digit in range(10)
            for entry in _entries(os.path.join(folder, split, str(digit)))
        )
        == count
        for split, count in COUNTS.items()
    )


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.name.endswith(".jpg")]
    except OSError:
        return []


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.digits",
        description="Write scikit-learn's handwritten digits as JPEG folders in ImageNet's layout.",
        epilog=cli.EXIT_CODES,
    )
    parser.add_argument(
        "folder", metavar="DIR", help="folder to write; created if missing, kept if complete"
    )
    folder = parser.parse_args(argv).folder

    def write(_: Pool) -> None:
        written = write_digits(folder)
        print(f"{folder}: {COUNTS['train']} training and {COUNTS['val']} validation images", end="")
        print("" if written else " (already there)")

    return cli.run("data.digits", write)


if __name__ == "__main__":
    sys.exit(main())
