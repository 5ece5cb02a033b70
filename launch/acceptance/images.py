"""JPEGs of noise with ImageNet's usual size, in its layout of folders."""

from __future__ import annotations

import os
from pathlib import Path

from data.synthetic import Jpegs

_CLASSES, _DISTINCT = 8, 16
_JPEGS = Jpegs(height=375, width=500, grain=13.0, quality=92)


def write(folder: Path, count: int) -> Path:
    """Write a folder of `count` images, and return it. Only some differ: the others are hard links to them."""
    for number in range(max(count, _CLASSES)):
        path = folder / f"n{number % _CLASSES:08d}" / f"{number:08d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < _DISTINCT:
            _JPEGS.draw((0, number)).save(path, quality=_JPEGS.quality)
        else:
            first = number % _DISTINCT
            os.link(folder / f"n{first % _CLASSES:08d}" / f"{first:08d}.jpg", path)
    return folder
