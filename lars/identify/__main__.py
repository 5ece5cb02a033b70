"""The command: python -m lars.identify package.module:Class."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence

from lars.errors import UsageError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m lars.identify",
        description="Which published rule is this optimizer? The command runs a torch optimizer and every named form "
        "of LARS and LAMB on the same gradients, and compares their moves. It exits with 0 if a form equals the "
        "optimizer, with 1 if none does, and with 2 if the optimizer cannot be used.",
        epilog="example: python -m lars.identify timm.optim:Lars --option trust_clip=True",
    )
    made.add_argument(
        "optimizer", metavar="package.module:Class", help="the class of the optimizer"
    )
    made.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of its constructor, or of the optimizer that it wraps; may be repeated",
    )
    made.add_argument(
        "--wraps",
        metavar="package.module:Class",
        help="optimizer that it takes as its first argument (default: torch.optim:SGD if that argument is an "
        "optimizer)",
    )
    made.add_argument("--all", action="store_true", help="show all rules, and not only the nearest")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    # torch is loaded only now, so that --help appears at once.
    from lars.identify.candidate import load
    from lars.identify.report import json_of, text_of
    from lars.identify.verdict import identify

    try:
        verdict = identify(load(options.optimizer, options.option, options.wraps))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(json_of(verdict), indent=2))
    else:
        print(text_of(verdict, all_rows=options.all))
    return 0 if verdict.equal else 1


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends the program silently
    sys.exit(main())
