"""Seeded noise as JPEG folders in ImageNet's layout, for speed measurements and tests.

    python -m data.synthetic DIR --train-size 10000 --val-size 1000

writes DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg. By default the images have ImageNet's usual
size in pixels and bytes (500x375, about 100 KB). So file systems, decoders and DALI do the work
that they do in training, with nothing to download. The bytes depend on the flags only, not on the
number of workers. A class folder appears complete or not at all. To continue after an interruption,
run the same command again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data import DataError
from data.tooling import cli

if TYPE_CHECKING:
    from PIL.Image import Image

    from data.tooling.pool import Pool

_LONGEST_SIDE = 65_500  # pixels; libjpeg's limit


@dataclass(frozen=True)
class Jpegs:
    """Appearance of the images.

    Attributes:
        height: Height in pixels.
        width: Width in pixels.
        grain: Standard deviation of the noise on top of the smooth colours, in grey levels.
        quality: JPEG quality.
    """

    height: int
    width: int
    grain: float
    quality: int

    def draw(self, seed: Sequence[int]) -> Image:
        """Draw an image: smooth colours as in a photograph, and noise as from a sensor."""
        import numpy as np
        from PIL import Image

        rng = np.random.default_rng(seed)
        patches = rng.integers(0, 256, (self.height // 12 + 1, self.width // 12 + 1, 3), np.uint8)
        size = self.width, self.height
        smooth = Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)
        noise = rng.standard_normal((self.height, self.width, 3), np.float32) * self.grain
        return Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8))


@dataclass(frozen=True)
class ClassFolder:
    """One class folder to write: images label, label + classes, ... of a split."""

    folder: str
    images: range
    seed: tuple[int, int]  # the flag; the number of the split
    jpegs: Jpegs


def write_class(task: ClassFolder) -> int:
    """Write one class folder; return the number of images."""
    from data.tooling.atomic import new_folder

    with new_folder(task.folder) as unfinished:
        for index in task.images:
            image = task.jpegs.draw((*task.seed, index))
            path = os.path.join(unfinished, f"{index:08d}.jpg")
            image.save(path, quality=task.jpegs.quality)
    return len(task.images)


def write_folders(options: argparse.Namespace, pool: Pool) -> None:
    """Write both splits, or the missing class folders of them."""
    from data.tooling.atomic import is_unfinished, read_json, write_json
    from data.tooling.pool import make_folders

    root, classes = options.folder, options.num_classes
    settings = {k: v for k, v in vars(options).items() if k not in ("folder", "workers")}
    os.makedirs(root, exist_ok=True)
    note = os.path.join(root, "synthetic.json")
    there = [name for name in os.listdir(root) if not is_unfinished(name)]
    if there and read_json(note) != settings:
        raise DataError(
            f"{root} holds something else, or noise made with other flags; remove it or name "
            "another folder"
        )
    write_json(note, settings)
    jpegs = Jpegs(options.height, options.width, options.grain, options.quality)
    sizes = {"train": options.train_size, "val": options.val_size}
    for number, (split, size) in enumerate(sizes.items()):
        tasks = [
            ClassFolder(
                os.path.join(root, split, f"n{label:08d}"),
                range(label, size, classes),
                (options.seed, number),
                jpegs,
            )
            for label in range(classes)
        ]
        make_folders(os.path.join(root, split), tasks, write_class, pool)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.synthetic",
        description="Write JPEGs of seeded noise in ImageNet's layout, to measure loaders with.",
        epilog=cli.EXIT_CODES,
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="folder to write: DIR/train and DIR/val")
    for flag, default, text in (
        ("--num-classes", 10, "class folders in each split"),
        ("--train-size", 1000, "number of training images"),
        ("--val-size", 100, "number of validation images"),
        ("--height", 375, "height of every image, in pixels"),
        ("--width", 500, "width of every image, in pixels"),
        ("--grain", 13.0, "noise in grey levels; more noise makes larger files"),
        ("--quality", 92, "JPEG quality, 1 to 100"),
        ("--seed", 0, "seed of the noise"),
    ):
        add(flag, type=type(default), default=default, help=f"{text} (default: {default})")
    cli.add_workers(parser)
    options = parser.parse_args(argv)
    if min(options.num_classes, options.height, options.width) < 1:
        parser.error("--num-classes, --height and --width must be at least 1")
    if min(options.train_size, options.val_size) < options.num_classes:
        parser.error(
            "--train-size and --val-size must be at least --num-classes, so that no class is empty"
        )
    if max(options.height, options.width) > _LONGEST_SIDE:
        parser.error(
            f"--height and --width must be at most {_LONGEST_SIDE}, the limit of JPEG files"
        )
    if not 1 <= options.quality <= 100 or not 0 <= options.grain <= 255 or options.seed < 0:
        parser.error(
            "--quality must lie between 1 and 100, --grain between 0 and 255; --seed must not be "
            "negative"
        )
    return cli.run("data.synthetic", lambda pool: write_folders(options, pool), options.workers)


if __name__ == "__main__":
    sys.exit(main())
