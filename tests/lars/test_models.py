"""Networks by name."""

from __future__ import annotations

import pytest
import torch

from lars.errors import UsageError
from lars.models import build, names


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "alexnet", "googlenet", "efficientnet_b0"]
)
def test_networks_have_the_requested_number_of_outputs(name):
    model = build(name, 7).train()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_the_resnets_are_available():
    assert {"resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "alexnet"} <= set(names())


def test_with_zero_gammas_each_block_is_the_identity():
    torch.manual_seed(0)
    block = build("resnet18", 7, zero_init_last_gamma=True).layer1[0].train()
    x = torch.rand(2, 64, 8, 8)
    assert torch.equal(block(x), x)
    bottleneck = build("resnet50", 7, zero_init_last_gamma=True).layer1[1]
    assert torch.equal(bottleneck(x.repeat(1, 4, 1, 1)), x.repeat(1, 4, 1, 1))


def test_unknown_names_and_impossible_options_are_refused():
    with pytest.raises(UsageError, match=r"--model resnet35 .*resnet34.*resnet50"):
        build("resnet35", 7)
    with pytest.raises(UsageError, match="--zero-init-last-gamma"):
        build("alexnet", 7, zero_init_last_gamma=True)
