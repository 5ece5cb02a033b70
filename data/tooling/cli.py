"""What the command lines of the data tools share: ``--workers``, exit codes, and Ctrl-C.

Importing it is cheap, so that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from typing import TYPE_CHECKING

from data import DataError
from data.tooling import launcher

if TYPE_CHECKING:
    from data.tooling.pool import Pool

EXIT_CODES = (
    "Exit codes: 0 done, 1 another error, 2 a wrong flag, 3 a problem with the data, "
    "130 interrupted."
)

_INTERRUPTED = 130  # as shells count: 128 + SIGINT
_READER_GONE = 141  # 128 + SIGPIPE

# How long the other tasks let rank 0 report an error before they end. Some launchers kill all tasks
# as soon as one has ended.
_REPORT_SECONDS = 2.0


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add ``--workers``."""
    parser.add_argument(
        "--workers",
        type=workers,
        help="number of processes; 0 works in the main process (default: one per available CPU)",
    )


def add_data(parser: argparse._ActionsContainer) -> None:
    """Add ``--data``."""
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="where the images are; the layout is recognised (docs/data.md lists all)",
    )


def add_index_dir(parser: argparse._ActionsContainer) -> None:
    """Add ``--index-dir``."""
    parser.add_argument(
        "--index-dir",
        help="with --data: folder for the index of WebDataset's tars, or of TFRecords without index "
        "files (default: beside the data, or the cache if that is read-only)",
    )


def workers(text: str) -> int:
    """Parse ``--workers``."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} must be at least 0")
    tasks, name = launcher.tasks()
    if tasks > 1:
        raise argparse.ArgumentTypeError(
            f"has no effect under {name}, whose {tasks} tasks do the work; leave it out, or start "
            "one task"
        )
    return number


def refuse_unwritable(parser: argparse.ArgumentParser, flag: str, path: str | None) -> None:
    """End with exit code 2, before hours of work, if a file named by a flag cannot be written."""
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.basename(path):
        parser.error(f"{flag}: {path} is a folder; name a file")
    if os.path.exists(path) and not os.path.isfile(path):  # it would be replaced by a file
        parser.error(f"{flag}: {path} is a device or a pipe; name a file")
    if not os.path.isdir(folder):
        parser.error(f"{flag}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        parser.error(f"{flag}: {folder} cannot be written to")


def refuse_unwritable_folder(parser: argparse.ArgumentParser, flag: str, path: str) -> None:
    """End with exit code 2 if the folder that a flag names can be neither written nor created."""
    folder = os.path.abspath(path)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        parser.error(f"{flag}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        parser.error(f"{flag}: {folder} cannot be written to")


def run(name: str, work: Callable[[Pool], bool | None], workers: int | None = 0) -> int:
    """Run a tool's work on a pool, report an error in one line, and return the exit code.

    Args:
        name: Name of the tool.
        work: The work. It returns False if it found that the data cannot be used.
        workers: Number of processes; see `data.tooling.pool.pool`.
    """
    from data.tooling.limits import TOO_MANY_FILES, too_many_open_files
    from data.tooling.pool import LauncherError, pool

    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with pool(workers) as process_pool:
            well = process_pool is None or work(process_pool) is not False
        sys.stdout.flush()
        return 0 if well else DataError.exit_code
    except KeyboardInterrupt:
        code, reason = _INTERRUPTED, "interrupted; to continue, run the same command again"
    except LauncherError as error:
        code, reason = error.exit_code, str(error)
        if launcher.rank():
            time.sleep(_REPORT_SECONDS)
            return code
    except DataError as error:
        code, reason = error.exit_code, str(error)
    except BrokenExecutor:
        code = 1
        reason = (
            "a worker process was killed, perhaps because memory ran out (see dmesg); finished work "
            "is kept: run the same command again with fewer --workers"
        )
    except BrokenPipeError:  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE
    except OSError as error:
        too_many = error.errno in TOO_MANY_FILES
        code, reason = 1, str(too_many_open_files() if too_many else error)
    print(f"{name}: {reason}", file=sys.stderr)
    return code
