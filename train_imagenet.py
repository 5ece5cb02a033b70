#!/usr/bin/env python
"""Train an ImageNet network on image folders or TFRecords with the built-in loader."""

from data.sources.imagenet import ImageNet
from lars.config import Config, parse
from lars.job.interrupt import Interrupt
from lars.launcher import announce

EXAMPLES = """\
examples:
  8 GPUs, effective batch size 1024 (76.96 % after 90 epochs in the published table):
    mpirun -np 8 python train_imagenet.py --train-dir DIR/train --val-dir DIR/val --base-op lars \\
        --batch-size 128 --base-lr 5.6568542494924 --warmup-epochs 0.3125 --wd 1e-4
  images as Kaggle, torchvision or others lay them out: --data DIR instead of --train-dir and --val-dir
  the same training with 2 GPUs: add --effective-batch-size 1024
  a recipe file, with one flag changed:
    mpirun -np 2 python train_imagenet.py @launch/recipes/digits_lars_1024.args --seed 1
"""


def main() -> None:
    """Read the command line and train."""
    config, source = parse(None, Config, ImageNet, description=__doc__, epilog=EXAMPLES)

    interrupt = Interrupt(config.stop_signals)
    announce("loading torch and checking the images ...")
    from lars.engine import train  # loads torch, so it comes after --help and the signal handlers

    train(config, source, interrupt)


if __name__ == "__main__":
    main()
