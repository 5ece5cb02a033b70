"""The embedded data set: scikit-learn's handwritten digits as JPEG folders in ImageNet's layout.

    python -m data.digits DIR

writes DIR/train/<class>/*.jpg (1,437 images) and DIR/val/<class>/*.jpg (360): real data and the
real decoding path, with nothing to download. The digits (Alpaydin and Kaynak's, UCI, 1998; 8x8
pixels, 17 grey levels) are enlarged to 32x32 and saved at quality 95.

Of the images sorted by class, every fifth is for validation, so each class has its share in both.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data import DataError, tool
from data.atomic import new_folder, sweep_beside
from data.parallel import Pool

SIDE = 32
QUALITY = 95
COUNTS = {"train": 1437, "val": 360}


def write_digits(folder: str) -> bool:
    """Write the data set to `folder`, complete or not at all.

    Returns:
        True if it was written, False if it was there already.

    Raises:
        DataError: `folder` exists and holds something else.
    """
    folder = os.path.abspath(folder)
    sweep_beside(folder)
    if os.path.lexists(folder):
        if _complete(folder):
            return False
        raise DataError(f"{folder} exists and is not this data set; remove it or name another")
    try:
        with new_folder(folder) as unfinished:
            _write_images(unfinished)
    except OSError:
        if _complete(folder):  # another process was quicker
            return False
        raise
    return True


def _write_images(folder: str) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.argsort(bunch.target, kind="stable")
    for position, index in enumerate(order.tolist()):
        split = "val" if position % 5 == 0 else "train"
        class_folder = os.path.join(folder, split, str(bunch.target[index]))
        os.makedirs(class_folder, exist_ok=True)
        path = os.path.join(class_folder, f"{index:04d}.jpg")
        _enlarged(bunch.images[index]).save(path, quality=QUALITY)


def _enlarged(digit: NDArray[np.float64]) -> Image.Image:
    grey = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8))
    return grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")


def _complete(folder: str) -> bool:
    """Say whether all images are there and none is empty (after a crash of the machine)."""
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
        epilog=tool.EXIT_CODES,
    )
    parser.add_argument("folder", metavar="DIR", help="where to; made if missing, kept if complete")
    folder = parser.parse_args(argv).folder

    def write(_: Pool) -> None:
        written = write_digits(folder)
        print(f"{folder}: {COUNTS['train']} training and {COUNTS['val']} validation images", end="")
        print("" if written else " (were there already)")

    return tool.run("data.digits", write)


if __name__ == "__main__":
    sys.exit(main())
