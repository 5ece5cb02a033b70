"""A stand-in for a training script: it starts at once, and counts the steps that it has ever taken.

Like the trainer it locks its run folder, saves on SIGTERM, exits with code 75, and resumes.
"""

import argparse
import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lars.run.files import atomic_write
from lars.run.lock import locked


@dataclass(frozen=True)
class Flags:
    """The settings of a stand-in."""

    steps: int = 20
    code: int = 0
    seed: int = 0


def read_flags(argv: list[str]) -> tuple[Flags]:
    """Read the flags of a cell."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("steps", "code", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Flags, name))
    return (Flags(**vars(parser.parse_known_args(argv)[0])),)


def main() -> None:
    """Take the steps that are left."""
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    (flags,) = read_flags(sys.argv[1:])
    place = argparse.ArgumentParser(allow_abbrev=False)
    place.add_argument("--log-dir", type=Path)
    place.add_argument("--run-name")
    where = place.parse_known_args()[0]
    folder = where.log_dir / where.run_name
    with locked(folder):
        checkpoint = folder / "checkpoint.pth.tar"
        for step in range(int(checkpoint.read_text()) if checkpoint.exists() else 0, flags.steps):
            if stop:
                sys.exit(75)
            time.sleep(0.02)
            with (where.log_dir.parent / f"steps-{where.run_name}").open("a") as file:
                file.write(f"{step}\n")
            with atomic_write(checkpoint) as file:
                file.write(str(step + 1).encode())
        rows = [{"split": split, "step": flags.steps, "top1": 50 + flags.seed, "seconds": 1.0}
                for split in ("train", "val")]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sys.exit(flags.code)


if __name__ == "__main__":
    main()
