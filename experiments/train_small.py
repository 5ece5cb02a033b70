#!/usr/bin/env python
"""Train a network on a small data set, with the training loop and the flags of train_imagenet.py."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.sources.cifar import Cifar10, Cifar100
from data.sources.digits import Digits
from data.sources.mnist import Mnist
from data.sources.noise import Synthetic
from data.sources.tiny_imagenet import TinyImageNet
from lars.config import Config, parse
from lars.job.interrupt import Interrupt
from lars.launcher import announce

SOURCES = {"cifar10": Cifar10, "cifar100": Cifar100, "tiny-imagenet": TinyImageNet, "mnist": Mnist,
           "digits": Digits, "noise": Synthetic}  # fmt: skip

EXAMPLES = """\
examples:
  scikit-learn's digits, which need no files, on two ranks:
    mpirun -np 2 python experiments/train_small.py --model resnet18 --batch-size 128 --epochs 5
  Fashion-MNIST, from its four files in DIR:
    python experiments/train_small.py --dataset mnist --data-dir DIR --model resnet18 --base-op lars
  the flags of another data set:
    python experiments/train_small.py --dataset cifar10 --help
"""


@dataclass(frozen=True)
class DataSet:
    """The flag that selects the source."""

    dataset: str = field(
        default="digits",
        metadata={"help": "the data set; mnist reads Fashion-MNIST too", "choices": tuple(SOURCES)},
    )


def read_flags(
    argv: Sequence[str],
    *more: type,
    config_class: type[Config] = Config,
    description: str | None = __doc__,
    epilog: str = EXAMPLES,
) -> tuple[Any, ...]:
    """Read a command line without the program's name.

    Args:
        argv: The flags.
        more: Dataclasses with the flags of a script that does more than this one.
        config_class: `Config`, or a class that derives from it.
        description: Text at the start of ``--help``.
        epilog: Text at the end of ``--help``.

    Returns:
        The `Config`, the `DataSet`, the source, and an object of each class in `more`.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default=DataSet.dataset)
    name = first.parse_known_args(argv)[0].dataset
    source_class = SOURCES.get(name, Digits)  # `parse` refuses an unknown name
    flags = ["--log-dir", f"./logs/{name}", *argv]
    kinds = (config_class, DataSet, source_class, *more)
    read = parse(flags, *kinds, description=description or "", epilog=epilog)
    if read[1].dataset != name:  # the flags of the source depend on it
        print(
            f"--dataset {read[1].dataset} is in a recipe; give it on the command line",
            file=sys.stderr,
        )
        sys.exit(2)
    return read


def main() -> None:
    """Read the command line and train."""
    config, _, source = read_flags(sys.argv[1:])

    interrupt = Interrupt(config.stop_signals)
    announce("loading torch and checking the images ...")
    from lars.engine import train  # loads torch, so it comes after --help and the signal handlers

    train(config, source, interrupt)


if __name__ == "__main__":
    main()
