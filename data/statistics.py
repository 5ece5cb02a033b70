"""Mean and standard deviation of the training images of a data set, per channel.

    python -m data.statistics --data PATH

prints what a source needs for its ``mean`` and ``std``. Every image has the same weight, whatever
its size, because the network gets all images at the same size. The images are neither resized nor
augmented. For images x_i with m_i = mean(x_i) and q_i = mean(x_i^2) over their pixels, the mean is
the mean of all m_i, and the variance is the mean of all q_i minus the square of the mean.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

from data import DataError, layouts
from data.layouts import Options
from data.tooling import cli

if TYPE_CHECKING:
    from data.pixels.boxes import Pixels
    from data.samples import LabelledSamples
    from data.tooling.pool import Pool

CHANNELS = ("red", "green", "blue")
SMALL_SETS = ("mnist", "cifar", "tiny_imagenet", "digits")

_CHUNK = 500  # images per task


class Task(NamedTuple):
    """Some training images of a data set: the flag that names it, its value, and their numbers."""

    flag: str
    path: str
    options: Options
    numbers: range


@dataclass(frozen=True)
class Sums:
    """Sums over images of the means of their pixels and of their squared pixels, per channel.

    Attributes:
        images: Number of images.
        means: Sum of the means, in units of 0..255.
        squares: Sum of the means of the squares.
        unreadable: Messages about images that could not be read. They are not counted.
    """

    images: int
    means: tuple[float, ...]
    squares: tuple[float, ...]
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel: red, green, blue.

    Attributes:
        images: Number of images.
        unreadable: Number of images that could not be read and were left out.
        mean: Means in units of 0..255.
        std: Standard deviations in units of 0..255.
        mean_of_1: Means in units of 0..1.
        std_of_1: Standard deviations in units of 0..1.
    """

    images: int
    unreadable: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mean_of_1: tuple[float, ...]
    std_of_1: tuple[float, ...]


def sums_of(pixels: Pixels) -> tuple[list[float], list[float]]:
    """Return the mean and the mean square of each channel of an image, uint8 (height, width, 3)."""
    import numpy as np

    count = pixels.shape[0] * pixels.shape[1]
    total = pixels.sum(axis=(0, 1), dtype=np.int64)
    squares = np.square(pixels, dtype=np.uint32).sum(axis=(0, 1), dtype=np.int64)
    return (total / count).tolist(), (squares / count).tolist()


def add(parts: Sequence[Sums]) -> Sums:
    """Add sums. The result does not depend on the order of the parts."""
    return Sums(
        sum(part.images for part in parts),
        tuple(math.fsum(values) for values in zip(*(p.means for p in parts), strict=True)),
        tuple(math.fsum(values) for values in zip(*(p.squares for p in parts), strict=True)),
        tuple(sorted(message for part in parts for message in part.unreadable)),
    )


def statistics_of(sums: Sums) -> Statistics:
    """Return mean and standard deviation.

    Raises:
        DataError: No image could be read.
    """
    if not sums.images:
        raise DataError(f"no image could be read, for example: {sums.unreadable[0]}")
    mean = tuple(value / sums.images for value in sums.means)
    std = tuple(
        math.sqrt(max(0.0, square / sums.images - m * m))
        for square, m in zip(sums.squares, mean, strict=True)
    )
    return Statistics(
        sums.images,
        len(sums.unreadable),
        mean,
        std,
        tuple(value / 255 for value in mean),
        tuple(value / 255 for value in std),
    )


@functools.lru_cache(maxsize=1)
def open_training_images(flag: str, path: str, options: Options) -> LabelledSamples:
    """Open the training images that a flag names; each process does this once.

    Raises:
        DataError: They cannot be opened.
    """
    from data.samples.exclude import read_excluded
    from data.samples.records import open_records
    from data.samples.tree import scan
    from data.sources.cifar import Cifar
    from data.sources.digits import Digits
    from data.sources.mnist import Mnist
    from data.sources.tiny_imagenet import TinyImageNet

    if flag == "data":
        return layouts.open_split(layouts.find(path), "train", options)
    if flag == "train_dir":
        return scan(path, "--train-dir", read_excluded(options.exclude, "train"))
    if flag == "data_dir":
        base = options.label_base
        return open_records(path, "train", "--data-dir", options.exclude, label_base=base)
    if flag == "digits":
        return Digits().samples[0]
    if flag == "mnist":
        return Mnist(data_dir=path).samples[0]
    source = Cifar(archive=path) if flag == "cifar" else TinyImageNet(archive=path)
    return source.samples[0]


def measure(task: Task) -> Sums:
    """Return the sums over the images of a task."""
    from data.pixels.boxes import full_image

    samples = open_training_images(task.flag, task.path, task.options)
    means, squares, unreadable = [], [], []
    for number in task.numbers:
        try:
            pixels, _ = samples.read(number, full_image)
        except DataError as error:
            unreadable.append(str(error))
            continue
        mean, square = sums_of(pixels)
        means.append(mean)
        squares.append(square)
    return Sums(len(means), _columns(means), _columns(squares), tuple(unreadable))


def _columns(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(math.fsum(row[channel] for row in rows) for channel in range(len(CHANNELS)))


def table(statistics: Statistics) -> str:
    """Format the statistics for people."""
    lines = [
        f"{statistics.images:,} images, 0..255 and 0..1",
        "channel     mean      std     mean     std",
    ]
    columns = (statistics.mean, statistics.std, statistics.mean_of_1, statistics.std_of_1)
    for channel, mean, std, mean_of_1, std_of_1 in zip(CHANNELS, *columns, strict=True):
        lines.append(f"{channel:<7} {mean:8.3f} {std:8.3f} {mean_of_1:8.4f} {std_of_1:7.4f}")
    return "\n".join(lines)


def _run(options: argparse.Namespace, flag: str, pool: Pool) -> None:
    value = getattr(options, flag)
    path = value if isinstance(value, str) else ""
    how = Options(options.exclude, label_base=options.label_base, index_dir=options.index_dir)
    count = len(open_training_images(flag, path, how))
    tasks = [
        Task(flag, path, how, range(start, min(start + _CHUNK, count)))
        for start in range(0, count, _CHUNK)
    ]
    sums = add(list(pool.work(measure, tasks, "images x 500")))
    statistics = statistics_of(sums)
    if sums.unreadable:
        print(
            f"warning: {len(sums.unreadable)} images could not be read and are left out, for example: "
            f"{sums.unreadable[0]}",
            file=sys.stderr,
        )
    print(json.dumps(asdict(statistics)) if options.json else table(statistics))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.statistics",
        description="Print mean and standard deviation of the training images, per channel.",
        epilog=cli.EXIT_CODES,
    )
    chosen = parser.add_mutually_exclusive_group(required=True)
    cli.add_data(chosen)
    chosen.add_argument("--train-dir", help="folder of training images, one folder per class")
    chosen.add_argument("--data-dir", help="folder of TFRecords")
    chosen.add_argument("--mnist", help="folder of MNIST's or Fashion-MNIST's four files")
    chosen.add_argument("--cifar", help="archive of CIFAR-10 or CIFAR-100")
    chosen.add_argument("--tiny-imagenet", help="archive of Tiny-ImageNet")
    chosen.add_argument("--digits", action="store_true", help="scikit-learn's handwritten digits")
    parser.add_argument("--exclude", help="file that lists images to leave out, from data.check")
    parser.add_argument(
        "--label-base",
        type=int,
        choices=(0, 1),
        help="with --data or --data-dir: label of the first class, if the tool asks for it",
    )
    cli.add_index_dir(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    cli.add_workers(parser)
    options = parser.parse_args(argv)
    flag = next(
        name for name in ("data", "train_dir", "data_dir", *SMALL_SETS) if getattr(options, name)
    )
    if flag in SMALL_SETS and options.exclude:
        parser.error(f"--exclude has no effect with --{flag.replace('_', '-')}; leave it out")
    if options.label_base is not None and flag not in ("data", "data_dir"):
        parser.error("--label-base has no effect without --data or --data-dir")
    if options.index_dir and flag != "data":
        parser.error("--index-dir has no effect without --data")
    # A small set is in memory, and reading it again in each process would take longer than the work.
    workers = 0 if flag in SMALL_SETS else options.workers
    return cli.run("data.statistics", lambda pool: _run(options, flag, pool), workers)


if __name__ == "__main__":
    sys.exit(main())
