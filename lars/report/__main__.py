"""Write one HTML page about one or several runs. It needs no network, and it can be sent by mail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lars.errors import UsageError
from lars.run.files import atomic_write
from lars.run.records import read_runs, runs_parser

EXAMPLES = """\
examples:
  one run:
    python -m lars.report logs/imagenet/RUN --out report.html
  several runs side by side:
    python -m lars.report logs/imagenet/RUN1 logs/imagenet/RUN2 --out report.html
  all runs in a folder:
    python -m lars.report logs/imagenet --out report.html
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, and write the page."""
    parser = runs_parser("python -m lars.report", __doc__, EXAMPLES)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page to write (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    try:
        records = read_runs(options.runs)
    except UsageError as error:
        parser.error(str(error))
    try:
        from lars.report.page import page  # loads matplotlib and jinja2, which --help does not need
    except ImportError as error:
        parser.error(f"a report needs {error.name}, which ./launch/setup.sh installs")
    try:
        with atomic_write(options.out) as file:
            file.write(page(records).encode())
    except OSError as error:
        parser.error(f"--out {options.out} cannot be written: {error.strerror or error}")
    print(options.out.resolve())


if __name__ == "__main__":
    main()
