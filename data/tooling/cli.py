"""How the data tools begin and end: the flag they share, their exit codes, and Ctrl-C."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor

from data import DataError, parallel
from data.parallel import Pool

EXIT_CODES = "Exit codes: 0 done, 1 another error, 2 a flag, 3 the data, 130 interrupted."

_INTERRUPTED = 130  # as shells count: 128 + SIGINT


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add ``--workers``."""
    parser.add_argument(
        "--workers", type=workers, help="processes; 0: none (default: one for each CPU allotted)"
    )


def workers(text: str) -> int:
    """Read ``--workers``."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} must be 0 or more")
    if parallel.under_mpirun():
        raise argparse.ArgumentTypeError("does nothing under mpirun, whose ranks do the work")
    return number


def refuse_unwritable(parser: argparse.ArgumentParser, flag: str, path: str | None) -> None:
    """End with exit code 2, before hours of work, if a file named by a flag cannot be written."""
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.basename(path):
        parser.error(f"{flag}: {path} is a folder; name a file")
    if os.path.exists(path) and not os.path.isfile(path):  # it would be replaced
        parser.error(f"{flag}: {path} is a device or a pipe; name a file")
    if not os.path.isdir(folder):
        parser.error(f"{flag}: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        parser.error(f"{flag}: {folder} cannot be written to")


def refuse_unwritable_folder(parser: argparse.ArgumentParser, flag: str, path: str) -> None:
    """End with exit code 2 if the folder that a flag names can be neither written to nor made."""
    folder = os.path.abspath(path)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        parser.error(f"{flag}: {folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        parser.error(f"{flag}: {folder} cannot be written to")


def run(name: str, work: Callable[[Pool], bool | None], workers: int | None = 0) -> int:
    """Do a tool's work on a pool, say in one line what went wrong, and return the exit code.

    Args:
        name: Of the tool.
        work: Returns False if the data are not usable and it has said so.
        workers: As of `parallel.pool`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with parallel.pool(workers) as pool:
            well = pool is None or work(pool) is not False
        return 0 if well else DataError.exit_code
    except KeyboardInterrupt:
        code, reason = _INTERRUPTED, "interrupted; start the same command again"
    except DataError as error:
        code, reason = error.exit_code, str(error)
    except BrokenExecutor:
        code = 1
        reason = (
            "a worker process was killed, perhaps for memory (dmesg tells); what is done stays: "
            "start the same command again, with fewer --workers"
        )
    except OSError as error:
        code, reason = 1, str(error)
    print(f"{name}: {reason}", file=sys.stderr)
    return code
