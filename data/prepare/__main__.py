"""The command line of ``python -m data.prepare``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from data.tooling import cli

_ARCHIVES = ("train_tar", "train_dir", "val_tar", "val_dir", "devkit", "val_classes")
_OF_DATA = ("out", "exclude", "label_base", "index_dir", "images_per_shard")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description="Unpack ILSVRC2012's archives into one folder per class. Or print the layout and "
        "the speed of the images at --data, and convert them.",
        epilog=cli.EXIT_CODES,
    )
    add = parser.add_argument
    add("--train-tar", help="ILSVRC2012_img_train.tar, compressed or not")
    add("--train-dir", help="folder to write the training images to")
    add("--val-tar", help="ILSVRC2012_img_val.tar, compressed or not")
    add("--val-dir", help="folder to write the validation images to")
    add(
        "--devkit",
        help="ILSVRC2012_devkit_t12.tar.gz, which holds the classes of the validation images",
    )
    add("--val-classes", help="instead of --devkit: a file of lines <image file> <class>")
    add(
        "--data",
        help="instead of the above: images in any layout of docs/data.md. Print the layout, make an "
        "index if one is needed, and measure what a conversion would gain",
    )
    add("--out", help="with --data: folder to write the converted data to")
    add("--exclude", help="with --data: file that lists images to leave out, from data.check")
    add(
        "--label-base",
        type=int,
        choices=(0, 1),
        help="with --data: label of the first class, if the tool asks for it",
    )
    cli.add_index_dir(parser)
    add(
        "--images-per-shard",
        type=int,
        default=1252,
        help="with --out: largest number of images in one record file (default: %(default)s)",
    )
    cli.add_workers(parser)
    return parser


def _check_flags(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with exit code 2 for flags that contradict each other."""

    def given(names: Sequence[str]) -> list[str]:
        return [
            f"--{name.replace('_', '-')}"
            for name in names
            if getattr(options, name) != parser.get_default(name)
        ]

    if options.data:
        if others := given(_ARCHIVES):
            parser.error(f"{others[0]} has no effect with --data; leave one of them out")
        if options.images_per_shard < 1:
            parser.error("--images-per-shard must be at least 1")
        return
    if others := given(_OF_DATA):
        parser.error(f"{others[0]} has no effect without --data")
    if bool(options.train_tar) != bool(options.train_dir):
        parser.error("give both --train-tar and --train-dir, or neither")
    if bool(options.val_tar) != bool(options.val_dir):
        parser.error("give both --val-tar and --val-dir, or neither")
    if not options.train_tar and not options.val_tar:
        parser.error("give --train-tar, --val-tar or both; or --data")
    if options.val_tar and bool(options.devkit) == bool(options.val_classes):
        parser.error("--val-tar needs --devkit or --val-classes")
    if not options.val_tar and (options.devkit or options.val_classes):
        parser.error("--devkit and --val-classes have no effect without --val-tar")


def _refuse_out(parser: argparse.ArgumentParser, out: str, data: str) -> None:
    """End with exit code 2 if the folder of the converted data would be within that of the original data."""
    cli.refuse_unwritable_folder(parser, "--out", out)
    target, root = os.path.realpath(out), os.path.realpath(data)
    if os.path.commonpath([target, root]) == root:
        parser.error(f"--out: {out} is within --data {data}; name a folder outside it")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    _check_flags(parser, options)
    if options.out:
        _refuse_out(parser, options.out, options.data)
    if options.data:
        from data.prepare.advice import advise as work
    else:
        from data.prepare.archives import prepare as work
    return cli.run("data.prepare", lambda pool: work(options, pool), options.workers)


if __name__ == "__main__":
    sys.exit(main())
