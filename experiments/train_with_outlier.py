#!/usr/bin/env python
"""Train like train_small.py, but make the gradient of one step many times as large as it is.

The study of the forms of LARS uses this script. It shows what one outlier among the gradients does to each form.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import train_small
from lars.job.interrupt import Interrupt


@dataclass(frozen=True)
class Outlier:
    """Which gradient becomes an outlier."""

    outlier_step: int = field(
        default=0, metadata={"help": "the step with the outlier, counted from 1; 0: no outlier"}
    )
    outlier_factor: float = field(
        default=100.0, metadata={"help": "factor by which the gradient of that step is multiplied"}
    )


def read_flags(argv: Sequence[str]) -> tuple[Any, ...]:
    """Read a command line: the flags of train_small.py and those of `Outlier`, which comes last."""
    return train_small.read_flags(argv, Outlier, description=__doc__, epilog="")


def insert(outlier: Outlier) -> None:
    """Multiply the gradient of one step, after the ranks have exchanged it and before it is clipped."""
    from lars.learner.learner import Learner

    update = Learner._update

    def with_outlier(self: Learner, step: int, samples: int) -> Any:
        if step + 1 == outlier.outlier_step:
            for parameter in self.gradients.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(outlier.outlier_factor)
        return update(self, step, samples)

    Learner._update = with_outlier  # type: ignore[method-assign]


def main() -> None:
    """Read the command line and train."""
    config, _, source, outlier = read_flags(sys.argv[1:])
    interrupt = Interrupt(config.stop_signals)
    insert(outlier)
    from lars.engine import train

    train(config, source, interrupt)


if __name__ == "__main__":
    main()
