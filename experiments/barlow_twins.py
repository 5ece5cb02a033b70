#!/usr/bin/env python
"""Barlow Twins on a small data set: pretraining without labels, then a linear classifier on the frozen backbone."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.train_small import read_flags
from lars.config import UsageError
from lars.config.barlow_twins import BarlowTwinsConfig, LinearFlags, linear_config
from lars.job.interrupt import Interrupt
from lars.launcher import announce

EXAMPLES = """\
examples:
  scikit-learn's digits, which need no files, in some minutes on a CPU:
    python experiments/barlow_twins.py --model small_cnn_bn --projector 256-256-256 --epochs 60 --linear-epochs 20
  the same on two ranks:
    mpirun -np 2 python experiments/barlow_twins.py --model small_cnn_bn --batch-size 128 --projector 256-256-256
  the linear evaluation of an untrained backbone, for comparison:
    python experiments/barlow_twins.py --model small_cnn_bn --linear-epochs 20 --stage untrained
"""

# The flags of a source that distort images of one view. Pretraining has its own distortions.
ONE_VIEW = ("padding", "flip", "rotation")


def two_views(source: Any, name: str) -> Any:
    """The source with two views of each image.

    Raises:
        UsageError: It cannot deliver them.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(source)}
    if "views" not in defaults:
        raise UsageError(f"--dataset {name} has no two views of an image; use another data set")
    usual = {key: defaults[key] for key in ONE_VIEW if key in defaults}
    return dataclasses.replace(source, views=2, **usual)


def main() -> None:
    """Read the command line, and run the stages."""
    config, chosen, source, linear = read_flags(
        sys.argv[1:],
        LinearFlags,
        config_class=BarlowTwinsConfig,
        description=__doc__,
        epilog=EXAMPLES,
    )
    try:
        views = two_views(source, chosen.dataset)
    except UsageError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

    interrupt = Interrupt(config.stop_signals)
    announce("loading torch and checking the images ...")
    from lars.engine import train  # loads torch, so it comes after --help and the signal handlers
    from lars.run.identity import run_folder

    folder = run_folder(config)
    if linear.stage in ("both", "pretraining"):
        train(config, views, interrupt)
        interrupt = Interrupt(config.stop_signals)  # the end of a job removes the handlers
    if linear.stage == "pretraining" or (linear.stage == "both" and config.only_looks):
        return
    trained = linear.stage != "untrained"
    evaluation = linear_config(
        config,
        linear,
        run_name=f"{folder.name}-{'linear' if trained else 'untrained'}",
        backbone=str(folder / "model.safetensors") if trained else "",
    )
    train(evaluation, dataclasses.replace(source, views=1), interrupt)


if __name__ == "__main__":
    main()
