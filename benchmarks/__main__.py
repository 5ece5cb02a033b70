"""Run all benchmarks, beside other packages, and write one page of tables.

    python -m benchmarks --quick                              # about 5 minutes on 2 cores
    python -m benchmarks --only optimizer checkpoint
    python -m benchmarks --only listing first-step requests --files 1281167
    python -m benchmarks --list

The candidates of a table take turns, round by round, so that a slow moment of the machine affects all of them alike.
Other packages are optional: ``./launch/setup.sh --peers`` installs timm and pytorch_optimizer, and ``--dali`` installs
NVIDIA DALI. If a package is not installed, its row says so. The results are written to --out with the endings .md and
.json. Compare relative speeds, and only within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import page
from benchmarks.rounds import Suite, in_turn
from lars.errors import UsageError
from lars.run.files import atomic_write

NAMES = (
    *("optimizer", "loader", "workers", "exchange", "step", "start", "validation", "checkpoint"),
    *("observers", "listing", "first-step", "requests"),
)
QUICK_SECONDS = 12  # for the rounds of a suite, after its warm-up
DEFAULT_OUT = "logs/benchmarks"


def parse() -> argparse.Namespace:
    """Read the flags and check them."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller files")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        default=[],
        help=f"only these tables: {', '.join(NAMES)}",
    )
    parser.add_argument("--list", action="store_true", help="describe the tables and end")
    parser.add_argument(
        "--files",
        type=int,
        help="training images of the tree that is listed (100000; --quick: 20000)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(DEFAULT_OUT),
        help=f"files to write, without ending ({DEFAULT_OUT})",
    )
    parser.add_argument(
        "--into",
        type=Path,
        help="also replace the tables between the markers with the name of --out in this page",
    )
    options = parser.parse_args()
    unknown = [name for name in options.only if name not in NAMES]
    if unknown:
        parser.error(f"--only {unknown[0]}: there is no such table; choose from {', '.join(NAMES)}")
    options.files = options.files or (20_000 if options.quick else 100_000)
    if options.files < 1000:
        parser.error(f"--files {options.files}: use at least 1000, one for each class")
    try:
        check_files(options)
    except UsageError as error:
        parser.error(str(error))
    return options


def check_files(options: argparse.Namespace) -> None:
    """Make the folder of ``--out``, and check the page of ``--into``, before time is spent.

    Raises:
        UsageError: One of them cannot be written.
    """
    try:
        if not options.list:
            options.out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(options.out.parent, os.W_OK) and not options.list:
            raise PermissionError(f"{options.out.parent} is not writable")
    except OSError as error:
        raise UsageError(f"--out {options.out}: cannot write there ({error})") from error
    if options.into:
        try:
            page.insert(options.into.read_text(), options.out.name, "")
        except (OSError, ValueError) as error:
            raise UsageError(f"--into {options.into}: {error}") from error


def suites() -> list[Suite]:
    """All suites, in the order of their names in NAMES."""
    from benchmarks.suites import compute, files, ranks

    found = {suite.name: suite for part in (compute, files, ranks) for suite in part.SUITES}
    return [found[name] for name in NAMES]


def measure(suite: Suite, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the candidates of a suite."""
    load = round(os.getloadavg()[0], 1)
    seconds, least = (QUICK_SECONDS, 2 + suite.warm_up) if options.quick else (300, 5)
    with tempfile.TemporaryDirectory() as folder, suite.prepare(Path(folder), options) as compared:
        values = in_turn(compared.turns, suite.rounds, seconds, least, warm_up=suite.warm_up)
        about = suite.about.format(files=options.files)
        return page.result(suite, about, compared, values, load=load)


def write(results: dict[str, Any], options: argparse.Namespace) -> str:
    """Write the results so far, and return the page."""
    text = page.markdown(results)
    for ending, content in ((".json", json.dumps(results, indent=1) + "\n"), (".md", text)):
        with atomic_write(options.out.with_name(options.out.name + ending)) as file:
            file.write(content.encode())
    return text


def command_of(options: argparse.Namespace) -> str:
    """The command that measures the same, without the flags of the files to write."""
    words = ["python", "-m", "benchmarks", *["--quick"] * options.quick]
    words += ["--only", *options.only] * bool(options.only)
    return " ".join([*words, "--files", str(options.files)])


def main() -> None:
    """Measure the chosen suites, and write the page after each of them."""
    options = parse()
    chosen = [s for s in suites() if s.name in options.only] if options.only else suites()
    if options.quick and not options.only:
        chosen = [suite for suite in chosen if suite.quick]
    if options.list:
        for suite in chosen:
            about = suite.about.format(files=options.files)
            print(f"{suite.name}: {suite.title} ({suite.unit})\n    {about}")
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from data.loader.workers import start_forkserver
    from lars.learner.device import keep_freed_memory

    torch.set_num_threads(1)
    start_forkserver()
    keep_freed_memory()
    # Leave the temporary folder empty, which may hold a million files.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    began = time.monotonic()
    results = {
        "command": command_of(options),
        "date": page.today(),
        "minutes": 0.0,
        "machine": page.machine(),
        "suites": [],
    }
    for suite in chosen:
        print(f"{suite.name}: {suite.title}", file=sys.stderr, flush=True)
        results["suites"].append(measure(suite, options))
        results["minutes"] = round((time.monotonic() - began) / 60, 1)
        text = write(results, options)
    print(text)
    if options.into:
        whole = page.insert(options.into.read_text(), options.out.name, text)
        with atomic_write(options.into) as file:
            file.write(whole.encode())


if __name__ == "__main__":
    main()
