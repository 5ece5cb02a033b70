"""Seeded noise, for speed runs and tests: a source without files, and JPEG folders.

    python -m data.synthetic DIR --train-size 10000 --val-size 1000

writes DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg in ImageNet's layout, by default of
ImageNet's usual size in pixels and bytes (500x375, about 100 KB), so that file systems, decoders
and DALI have the work that training gives them, with nothing to download. The bytes depend on the
flags alone, not on the number of workers. A class folder appears whole or not at all; a run that
was killed goes on where it was.

Importing this loads neither torch nor NumPy.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TYPE_CHECKING

from data import DataError, TrainLoader, ValLoader

if TYPE_CHECKING:
    from PIL.Image import Image

    from data.loading import Reader
    from data.parallel import Pool
    from data.transforms import Choose, Pixels


@dataclass(frozen=True)
class Synthetic:
    """Images of noise with labels index % classes. The contract is in `data`.

    Image i is the same in every epoch and differs from all others. Its mean grey level grows with
    its class, so that a network can learn it.
    """

    image_size: int = field(default=224, metadata={"help": "side of the square images, in pixels"})
    num_classes: int = field(default=1000, metadata={"help": "number of classes"})
    train_size: int = field(default=1_281_167, metadata={"help": "number of training images"})
    val_size: int = field(default=50_000, metadata={"help": "number of validation images"})

    mean = (127.5, 127.5, 127.5)
    std = (64.0, 64.0, 64.0)
    fingerprint = "noise-noise"  # the flags say all there is to it

    def check(self) -> None:
        """Raise DataError for sizes that cannot be had."""
        for name in ("image_size", "num_classes", "train_size", "val_size"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise DataError(f"{flag} {getattr(self, name)} must be 1 at least")

    def start_workers(self, workers: int) -> None:
        """Start the process that loader processes are forked from."""
        from data.workers import start_forkserver

        start_forkserver()

    def train_loader(self, share: Any, workers: int) -> TrainLoader:
        """Make the training loader of one rank."""
        from data import loading
        from data.sampler import Order

        order = Order(
            self.train_size,
            share.batch_size,
            share.effective_batch_size,
            share.drop_last,
            share.seed,
        )
        return loading.TrainLoader(
            self._reader(self.train_size, 0), order, share.rank, share.size, workers
        )

    def val_loader(self, share: Any, workers: int) -> ValLoader:
        """Make the validation loader of one rank."""
        from data import loading

        reader = self._reader(self.val_size, self.train_size)
        return loading.ValLoader(reader, share.val_batch_size, share.rank, share.size, workers)

    def _reader(self, samples: int, first: int) -> Reader:
        from data.loading import Reader
        from data.transforms import ValTransform

        noise = _Noise(samples, first, self.num_classes, self.image_size)
        return Reader(noise, ValTransform(self.image_size, self.image_size))


@dataclass(frozen=True)
class _Noise:
    """Numbers `first` .. `first + samples` of the noise."""

    samples: int
    first: int
    classes: int
    side: int

    def __len__(self) -> int:
        return self.samples

    def read(self, index: int, choose: Choose) -> tuple[Pixels, int]:
        """Return an image and its label: a window of one block of noise, brighter by its class."""
        import numpy as np

        from data.transforms import cut

        numel = 3 * self.side * self.side
        start = (self.first + index) * 7919 % _BLOCK
        label = index % self.classes
        window = _block(numel)[start : start + numel] + np.uint8(label * 127 // self.classes)
        return cut(window.reshape(self.side, self.side, 3), choose(self.side, self.side)), label


_BLOCK = 1_000_003  # prime: 7919 steps through all of it before an image comes back


@functools.cache
def _block(numel: int) -> Pixels:
    import numpy as np

    words = np.random.Philox(key=0).random_raw((_BLOCK + numel) // 8 + 1)
    return words.view(np.uint8)[: _BLOCK + numel] >> np.uint8(1)


_LONGEST_SIDE = 65_500  # libjpeg's


@dataclass(frozen=True)
class Jpegs:
    """What the images that are written look like.

    Attributes:
        height: In pixels.
        width: In pixels.
        grain: Standard deviation of the noise over the smooth colours, in grey levels.
        quality: Of the JPEGs.
    """

    height: int
    width: int
    grain: float
    quality: int

    def draw(self, seed: Sequence[int]) -> Image:
        """Draw an image: smooth colours like a photograph's under noise like a sensor's."""
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
    """One class of one split to write: images label, label + classes, ... of the split."""

    folder: str
    images: range
    seed: tuple[int, int]  # of the run; of the split
    jpegs: Jpegs


def write_class(task: ClassFolder) -> int:
    """Write one class folder; return the number of images."""
    from data.atomic import new_folder

    with new_folder(task.folder) as unfinished:
        for index in task.images:
            image = task.jpegs.draw((*task.seed, index))
            path = os.path.join(unfinished, f"{index:08d}.jpg")
            image.save(path, quality=task.jpegs.quality)
    return len(task.images)


def write_folders(options: argparse.Namespace, pool: Pool) -> None:
    """Write both splits, or what is missing of them."""
    from data.atomic import is_unfinished, read_json, write_json
    from data.parallel import make_folders

    root, classes = options.folder, options.num_classes
    settings = {k: v for k, v in vars(options).items() if k not in ("folder", "workers")}
    os.makedirs(root, exist_ok=True)
    note = os.path.join(root, "synthetic.json")
    there = [name for name in os.listdir(root) if not is_unfinished(name)]
    if there and read_json(note) != settings:
        raise DataError(
            f"{root} holds something else, or noise of other flags; remove it or name another"
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
    from data import tool

    parser = argparse.ArgumentParser(
        prog="python -m data.synthetic",
        description="Write JPEGs of seeded noise in ImageNet's layout, to measure loaders with.",
        epilog=tool.EXIT_CODES,
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="where to: DIR/train and DIR/val")
    for flag, default, text in (
        ("--num-classes", 10, "class folders of each split"),
        ("--train-size", 1000, "training images"),
        ("--val-size", 100, "validation images"),
        ("--height", 375, "of every image, in pixels"),
        ("--width", 500, "of every image, in pixels"),
        ("--grain", 13.0, "noise in grey levels; more: larger files"),
        ("--quality", 92, "of the JPEGs, 1 to 100"),
        ("--seed", 0, "of the noise"),
    ):
        add(flag, type=type(default), default=default, help=f"{text} (default: {default})")
    tool.add_workers(parser)
    options = parser.parse_args(argv)
    if min(options.num_classes, options.height, options.width) < 1:
        parser.error("--num-classes, --height and --width must be 1 at least")
    if min(options.train_size, options.val_size) < options.num_classes:
        parser.error("--train-size and --val-size must be --num-classes at least: no empty classes")
    if max(options.height, options.width) > _LONGEST_SIDE:
        parser.error(f"--height and --width must be {_LONGEST_SIDE} at most: no JPEG is larger")
    if not 1 <= options.quality <= 100 or not 0 <= options.grain <= 255 or options.seed < 0:
        parser.error(
            "--quality lies between 1 and 100, --grain between 0 and 255; --seed is not negative"
        )
    return tool.run("data.synthetic", lambda pool: write_folders(options, pool), options.workers)


if __name__ == "__main__":
    sys.exit(main())
