"""The command line of ``python -m data.check``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data.tooling import cli

if TYPE_CHECKING:
    from data.tooling.pool import Pool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return the exit code, 3 if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m data.check",
        description="Decode every image, verify every record, and report what is wrong.",
        epilog=cli.EXIT_CODES,
    )
    add = parser.add_argument
    add("--train-dir", help="folder of training images, one folder per class")
    add("--val-dir", help="folder of validation images, one folder per class")
    add("--data-dir", help="folder of TFRecords, instead of the two folders of images")
    cli.add_data(parser)
    add(
        "--label-base",
        type=int,
        choices=(0, 1),
        help="label of the first class in TFRecords, parquet files or WebDataset's tars (default: "
        "what the manifest of records says; without one, 1 for image/class/label, and 0 for the "
        "label of all others)",
    )
    cli.add_index_dir(parser)
    add(
        "--report",
        help="write all findings to this JSON file; an interrupted check continues if it is given "
        "the same file",
    )
    add("--list", help="write the names of unreadable images to this file, for --exclude")
    cli.add_workers(parser)
    options = parser.parse_args(argv)
    if bool(options.train_dir) != bool(options.val_dir):
        parser.error("give both --train-dir and --val-dir, or --data, or --data-dir")
    given = [flag for flag in ("data", "data_dir", "train_dir") if getattr(options, flag)]
    if len(given) != 1:
        parser.error("give one of --data, --data-dir, and --train-dir with --val-dir")
    if options.label_base is not None and options.train_dir:
        parser.error("--label-base has no effect without --data or --data-dir")
    if options.index_dir and not options.data:
        parser.error("--index-dir has no effect without --data")
    cli.refuse_unwritable(parser, "--report", options.report)
    cli.refuse_unwritable(parser, "--list", options.list)
    if options.report and options.list and _same(options.report, options.list):
        parser.error("--report and --list name the same file")
    return cli.run("data.check", lambda pool: _check(options, pool), options.workers)


def _check(options: argparse.Namespace, pool: Pool) -> bool:
    from data.check.work import check

    return check(options, pool)


def _same(path: str, other: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


if __name__ == "__main__":
    sys.exit(main())
