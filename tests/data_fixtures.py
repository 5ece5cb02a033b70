"""Small image trees for the tests of the data rooms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def photograph(height: int, width: int, seed: int) -> np.ndarray:
    """Return smooth colours with some grain, uint8 (height, width, 3).

    Compresses like a photograph.
    """
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = rng.normal(0, 4, smooth.shape)
    return (smooth + grain).clip(0, 255).astype(np.uint8)


def write_tree(root: Path, classes: dict[str, int], seed: int = 0) -> Path:
    """Write `root`/<class>/<number>.jpg with images of many shapes, and return `root`."""
    rng = np.random.default_rng(seed)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            height, width = rng.integers(20, 90, 2)
            image = Image.fromarray(photograph(height, width, int(rng.integers(2**31))))
            image.save(root / name / f"{number:03d}.jpg", quality=90)
    return root
