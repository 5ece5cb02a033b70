"""Draw docs/images/augmentation.png: each augmentation of one photograph, in five random versions.

    python -m benchmarks.plot_augmentation

The photograph comes with scikit-learn (china.jpg by danielbuechele, CC BY 2.0).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image

from data.pixels.boxes import crop
from data.sources.imagenet import ImageNet

SIDE, GAP, LABEL = 96, 4, 190
SEEDS = (0, 1, 2, 4, 5)
ROWS = {
    "crop and mirror": {},
    "--auto-augment ra": {"auto_augment": "ra"},
    "--auto-augment ta": {"auto_augment": "ta"},
    "--auto-augment aa": {"auto_augment": "aa"},
    "--color-jitter 0.4": {"color_jitter": 0.4},
    "--random-erasing 1": {"random_erasing": 1.0},
}


def sheet() -> Image.Image:
    """Draw a row for each augmentation and a column for each seed."""
    pixels = load_sample_image("china.jpg")
    step = SIDE + GAP
    picture = Image.new("RGB", (LABEL + len(SEEDS) * step, len(ROWS) * step), "white")
    draw = ImageDraw.Draw(picture)
    for row, (name, flags) in enumerate(ROWS.items()):
        transform = ImageNet(image_size=SIDE, **flags).train_transform()
        draw.text((GAP, row * step + SIDE // 2 - 8), name, "black", font_size=16)
        for column, seed in enumerate(SEEDS):
            generator = torch.Generator().manual_seed(seed)
            box = transform.box(*pixels.shape[:2], generator)
            image = transform(crop(pixels, box), generator)
            tile = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
            picture.paste(tile, (LABEL + column * step, row * step))
    return picture


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parents[1] / "docs" / "images" / "augmentation.png"
    parser.add_argument("--out", type=Path, default=default, help="the file to write")
    sheet().quantize(256).save(parser.parse_args().out, optimize=True)


if __name__ == "__main__":
    main()
