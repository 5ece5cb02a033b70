"""Find out in ten minutes whether everything works on this machine, and how fast it is.

    python -m launch.acceptance                          # this host
    torchrun --nproc-per-node 8 -m launch.acceptance     # the same, and the ranks that the launcher starts
    launch/mpirun.sh -np 8 -m launch.acceptance
    python -m launch.acceptance --only step --minutes 3

It needs torch, torchvision and this repository. What else is missing is reported and left out. Most parts run on rank 0
of the launcher, and the part "ranks" runs on all. --out must then be in a folder that all hosts share.
Exit codes: 0 if nothing failed, 1 if a row failed, 2 for a wrong flag, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lars import launcher
from launch.acceptance import meeting, report
from launch.acceptance.parts import PARTS, Part
from launch.acceptance.rows import FAILED, not_tested

# Seconds for the start and the report, which the parts do not get, and the least time of a part.
_RESERVE, _LEAST = 5.0, 1.0


def parser() -> argparse.ArgumentParser:
    """All flags."""
    assert __doc__ is not None
    made = argparse.ArgumentParser(
        prog="python -m launch.acceptance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = tuple(PARTS)
    made.add_argument("--list", action="store_true", help="list the parts, and stop")
    made.add_argument(
        "--only",
        action="append",
        choices=names,
        metavar="PART",
        help="run only this part; may be repeated",
    )
    made.add_argument(
        "--skip",
        action="append",
        default=[],
        choices=names,
        metavar="PART",
        help="leave this part out; may be repeated",
    )
    made.add_argument(
        "--minutes", type=minutes, default=10.0, help="time for all parts together (default: 10)"
    )
    made.add_argument(
        "--out",
        type=Path,
        default=Path("logs/acceptance"),
        metavar="DIR",
        help="folder for acceptance.json, acceptance.png and the logs of the parts (default: logs/acceptance)",
    )
    return made


def minutes(text: str) -> float:
    """Read a time above 0."""
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts and report. Returns the exit code."""
    began = time.monotonic()
    flags = parser()
    options = flags.parse_args(argv)
    if options.list:
        for part in PARTS.values():
            print(f"{part.name:12}{part.what}")
        return 0
    parts = [
        part
        for part in PARTS.values()
        if part.name not in options.skip and part.name in (options.only or PARTS)
    ]
    if not parts:
        flags.error("--only and --skip leave no part to run; --list shows the parts")
    try:
        (options.out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        flags.error(f"--out {options.out}: {error.strerror}; name a folder that can be written")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    seconds = 60 * options.minutes - min(_RESERVE, 3 * options.minutes)
    try:
        if launcher.rank() > 0:
            follow(parts, options.out, seconds)
            return 0
        return lead(parts, options.out, began + seconds)
    except KeyboardInterrupt:
        print("interrupted; the rows so far are in acceptance.json", file=sys.stderr)
        return 130


def lead(parts: Sequence[Part], out: Path, deadline: float) -> int:
    """Run all parts on rank 0, print the table and write the files."""
    print("loading torch ...", flush=True)
    try:
        import launch.acceptance.training  # noqa: F401  # the processes of the parts are forked from this one
    except (ImportError, OSError) as error:
        print(
            f"{error}; torch, torchvision and NumPy are needed: ./launch/setup.sh", file=sys.stderr
        )
        return 1
    result = report.Report(out, began=datetime.datetime.now())
    remaining = sum(part.weight for part in parts)
    for number, part in enumerate(parts, start=1):
        left = deadline - time.monotonic()
        limit = left * part.weight / remaining
        remaining -= part.weight
        print(f"[{number}/{len(parts)}] {part.name}, at most {limit:.0f} s", flush=True)
        if limit < _LEAST:
            result.add(part.name, not_tested(part.name, "the time is used up; --minutes"))
            continue
        log = result.log_of(part.name)
        for row in rows_of(part, out, limit, log):
            result.add(part.name, row)
            print(f"      {report.line(row)}", flush=True)
    print(f"\n{result.table()}\n", flush=True)
    for path in result.finish():
        print(f"wrote {path}")
    return 1 if any(row.verdict == FAILED for _, row in result.rows) else 0


def rows_of(part: Part, out: Path, limit: float, log: Path) -> Any:
    """The rows of a part, on all ranks if it needs them, else without the launcher's environment."""
    from launch.acceptance.process import run_part

    if part.on_all_ranks and launcher.tasks()[0] > 1:
        with meeting.called(out):
            yield from run_part(part.module, limit, log)
    else:
        yield from run_part(part.module, limit, log, launcher.without(os.environ))


def follow(parts: Sequence[Part], out: Path, seconds: float) -> None:
    """Take part in what all ranks do together, on the other ranks. Their rows do not count."""
    from launch.acceptance.process import run_part

    deadline = time.monotonic() + seconds
    for part in parts:
        if part.on_all_ranks and meeting.wait(out, deadline):
            log = out / "logs" / f"{part.name}-{launcher.rank()}.log"
            log.unlink(missing_ok=True)
            for row in run_part(part.module, max(_LEAST, deadline - time.monotonic()), log):
                if row.verdict == FAILED:
                    print(f"rank {launcher.rank()}: {report.line(row)}", file=sys.stderr)
