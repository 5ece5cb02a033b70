"""From flags to a network and its optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lars.config import Config, parse
from lars.learner.build import build_model, make_optimizer


def read(*argv: str) -> Config:
    return parse(argv, Config, description="")[0]


def first_group(*argv: str) -> dict:
    return make_optimizer(read(*argv), nn.Linear(3, 2), lr=0.1).param_groups[0]


@pytest.mark.parametrize(
    ("argv", "option", "value"),
    [
        (["--base-op", "sgd", "--nesterov"], "nesterov", True),
        (["--base-op", "sgd"], "nesterov", False),
        (["--base-op", "lars", "--nesterov"], "nesterov", True),
        (["--base-op", "adam", "--betas", "0.8", "0.99"], "betas", (0.8, 0.99)),
        (["--base-op", "adamw"], "betas", (0.9, 0.999)),
        (["--base-op", "lamb", "--betas", "0.8", "0.99"], "betas", (0.8, 0.99)),
        (["--base-op", "lamb"], "max_grad_norm", 1.0),
        (["--base-op", "lamb", "--lamb-form", "tvlars"], "max_weight_norm", 10.0),
        (["--base-op", "lamb", "--lamb-form", "paper"], "bias_correction", True),
    ],
)
def test_flags_reach_the_optimizer(argv, option, value):
    assert first_group(*argv)[option] == value


def test_the_flag_of_initial_weights_reaches_the_network():
    first = build_model(read("--model", "small_cnn", "--weight-init", "xavier_normal"), 10)
    other = build_model(read("--model", "small_cnn"), 10)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert torch.equal(first[0].bias, other[0].bias)
