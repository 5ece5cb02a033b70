"""The command line of ``python -m data.make_tfrecords``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data import FlagError
from data.samples.record_files import refuse_common_folder
from data.tooling import cli

if TYPE_CHECKING:
    from data.tooling.pool import Pool


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.make_tfrecords",
        description="Write image folders as shuffled TFRecords with index files and a manifest, or "
        "verify and index existing TFRecords.",
        epilog=cli.EXIT_CODES,
    )
    add = parser.add_argument
    add("--data-dir", required=True, help="folder of the records (train, validation, idx_files)")
    cli.add_data(parser)
    add("--train-dir", help="folder of training images, one folder per class")
    add("--val-dir", help="folder of validation images, one folder per class")
    add("--from-tfrecords", action="store_true", help="index the records under --data-dir")
    add(
        "--label-base",
        type=int,
        choices=(0, 1),
        help="with --from-tfrecords: label of the first class (default: 1 for image/class/label, 0 "
        "for TensorFlow Datasets' label)",
    )
    add(
        "--images-per-shard",
        type=int,
        default=1252,
        help="largest number of images in one file; the default makes 1,024 files of ImageNet's "
        "training images (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of the order of the training images (default: %(default)s)",
    )
    add(
        "--reencode",
        action="store_true",
        help="convert anything but RGB and grayscale JPEGs with intact EXIF into such a JPEG",
    )
    add(
        "--short-side",
        type=int,
        default=0,
        help="shrink images to this shorter side, in pixels: faster to read and decode, but the "
        "pixels differ; docs/data.md has figures",
    )
    add(
        "--quality",
        type=int,
        default=90,
        help="quality of JPEGs that are re-encoded (default: %(default)s)",
    )
    add("--exclude", help="file that lists images to leave out, as written by python -m data.check")
    cli.add_workers(parser)
    return parser


def _check_flags(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with exit code 2 for flags that contradict each other."""
    if bool(options.train_dir) != bool(options.val_dir):
        parser.error("give both --train-dir and --val-dir")
    if sum(map(bool, (options.data, options.train_dir, options.from_tfrecords))) != 1:
        parser.error("give one of --data, --from-tfrecords, and --train-dir with --val-dir")
    flags = ("seed", "images_per_shard", "reencode", "short_side", "quality", "exclude")
    given = [flag for flag in flags if getattr(options, flag) != parser.get_default(flag)]
    if options.from_tfrecords and given:
        parser.error(f"--{given[0].replace('_', '-')} has no effect with --from-tfrecords")
    if options.label_base is not None and not options.from_tfrecords:
        parser.error("--label-base has no effect without --from-tfrecords")
    if "quality" in given and not (options.reencode or options.short_side):
        parser.error("--quality has no effect without --short-side or --reencode")
    if options.images_per_shard < 1:
        parser.error("--images-per-shard must be at least 1")
    if options.short_side < 0 or not 1 <= options.quality <= 100:
        parser.error("--short-side must not be negative; --quality must lie between 1 and 100")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    _check_flags(parser, options)
    cli.refuse_unwritable_folder(parser, "--data-dir", options.data_dir)
    given = {"--train-dir": options.train_dir, "--val-dir": options.val_dir}
    for flag, images in given.items() if options.train_dir else ():
        try:
            refuse_common_folder(options.data_dir, flag, images)
        except FlagError as error:
            parser.error(str(error))
    return cli.run("data.make_tfrecords", lambda pool: _make(options, pool), options.workers)


def _make(options: argparse.Namespace, pool: Pool) -> None:
    from data.make_tfrecords.work import make

    make(options, pool)


if __name__ == "__main__":
    sys.exit(main())
