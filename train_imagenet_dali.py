#!/usr/bin/env python
"""Train an ImageNet network on TFRecords or image folders, decoded and resized by NVIDIA DALI."""

from data.sources.imagenet import ImageNetDali
from lars.config import Config, parse
from lars.job.interrupt import Interrupt
from lars.launcher import announce

EXAMPLES = """\
examples:
  TFRecords in DIR/train and DIR/validation, index files in DIR/idx_files/train and DIR/idx_files/validation:
    mpirun -np 8 python train_imagenet_dali.py @launch/recipes/imagenet_lars_1024.args --data-dir DIR
  image folders, without conversion:
    mpirun -np 8 python train_imagenet_dali.py @launch/recipes/imagenet_lars_1024.args --reader folder \\
        --train-dir DIR/train --val-dir DIR/val
  any layout that docs/data.md lists: --data DIR instead of the flags above
  the crops of the published DALI script:
    add --crop-area 0.1 1.0 --crop-aspect 0.8 1.25
"""


def main() -> None:
    """Read the command line and train."""
    config, source = parse(None, Config, ImageNetDali, description=__doc__, epilog=EXAMPLES)

    interrupt = Interrupt(config.stop_signals)
    announce("loading torch and checking the images ...")
    from lars.engine import train  # loads torch, so it comes after --help and the signal handlers

    train(config, source, interrupt)


if __name__ == "__main__":
    main()
