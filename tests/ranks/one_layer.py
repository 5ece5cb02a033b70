"""Train on digits with SGD. From step BEGINS on, one layer has 100 times the learning rate of the others.

python tests/ranks/one_layer.py BEGINS LOG_DIR
"""

import sys

import torch

from data.sources.digits import Digits
from lars.config import Config
from lars.engine import train
from lars.learner import build

BEGINS, LOGS = int(sys.argv[1]), sys.argv[2]
LAYER = "6.weight"


class OneLayerFast(torch.optim.SGD):
    """SGD with a group whose rate is multiplied."""

    steps = 0

    def step(self, closure=None):
        """Multiply the rate of the last group during the step."""
        group = self.param_groups[-1]
        before = group["lr"]
        group["lr"] = before * (100 if self.steps >= BEGINS else 1)
        super().step(closure)
        group["lr"] = before
        self.steps += 1


def make_optimizer(config, model, lr):
    """The last group has a single layer."""
    named = dict(model.named_parameters())
    fast = [named.pop(LAYER)]
    return OneLayerFast([{"params": list(named.values())}, {"params": fast}], lr=lr, momentum=0.9)


def main() -> None:
    build.make_optimizer = make_optimizer
    config = Config(
        model="small_cnn", base_lr=2.0, warmup_epochs=0, batch_size=64, epochs=2, workers=0,
        layers_every=1, log_every=1, no_cuda=True, log_dir=LOGS, run_name="run", max_skipped_steps=3,
    )  # fmt: skip
    train(config, Digits())


main()
