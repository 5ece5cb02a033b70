"""Networks by name."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lars.errors import UsageError
from lars.models import build, names
from lars.names import WEIGHT_INITS


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "alexnet", "alexnet_bn", "googlenet", "efficientnet_b0"]
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


@pytest.mark.parametrize("name", ["small_cnn", "small_cnn_bn"])
def test_the_small_networks_take_any_image_from_28_pixels(name):
    model = build(name, 10).train()
    assert sum(p.numel() for p in model.parameters()) < 150_000
    for side in (28, 32, 61):
        assert model(torch.randn(2, 3, side, side)).shape == (2, 10)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == (name == "small_cnn_bn")


def test_the_gradient_of_the_small_network_does_not_depend_on_micro_batches():
    torch.manual_seed(0)
    model, images = build("small_cnn", 10).double(), torch.randn(4, 3, 28, 28, dtype=torch.float64)
    labels = torch.arange(4)

    def gradient(batch):
        model.zero_grad()
        for part in range(0, 4, batch):
            rows = slice(part, part + batch)
            nn.functional.cross_entropy(
                model(images[rows]), labels[rows], reduction="sum"
            ).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    torch.testing.assert_close(gradient(1), gradient(4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", WEIGHT_INITS)
def test_initial_weights_have_the_spread_of_their_rule(rule):
    torch.manual_seed(0)
    model = build("resnet18", 10, weight_init=rule)
    filled = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(filled) == 21
    if rule == "default":
        torch.manual_seed(0)
        default = build("resnet18", 10)
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), default.parameters(), strict=True)
        )
        return
    for module in filled:
        weight = module.weight.detach()
        fan_in, area = weight[0].numel(), weight[0, 0].numel()
        fan_out = weight.shape[0] * area
        fan = fan_in if rule.startswith("kaiming") else (fan_in + fan_out) / 2
        variance = (2 if rule.startswith("kaiming") else 1) / fan
        assert weight.var().item() == pytest.approx(variance, rel=0.1)
        bounded = weight.abs().max() <= (3 * variance) ** 0.5 * 1.0001
        assert bounded == rule.endswith("_uniform")
    assert model.fc.bias.abs().max() > 0, "biases keep their values"


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "efficientnet_b0"])
def test_a_small_stem_keeps_the_size_of_small_images(name):
    sizes = {}
    for small in (False, True):
        model = build(name, 10, small_stem=small).to("meta").eval()
        body = model.layer1 if name.startswith("resnet") else model.features[1]
        body.register_forward_pre_hook(
            lambda _, inputs, small=small: sizes.update({small: inputs[0].shape[-1]})
        )
        assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    assert sizes == {False: 8 if name.startswith("resnet") else 16, True: 32}


def test_the_first_convolution_of_a_small_stem_has_the_spread_of_the_others():
    torch.manual_seed(0)
    weight = build("resnet18", 10, small_stem=True).conv1.weight
    assert weight.shape == (64, 3, 3, 3)
    assert weight.var().item() == pytest.approx(2 / (64 * 9), rel=0.15)


def test_a_small_stem_is_refused_where_it_does_not_apply():
    with pytest.raises(UsageError, match="--small-stem is for ResNets and EfficientNets"):
        build("alexnet", 10, small_stem=True)


def test_alexnet_bn_is_torchvisions_alexnet_with_batch_norm():
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d, nn.MaxPool2d, nn.Dropout)
    layers = [m for m in build("alexnet_bn", 10).modules() if isinstance(m, kinds)]
    plain = [m for m in build("alexnet", 10).modules() if isinstance(m, kinds)]
    weights = [m.weight.shape for m in layers if isinstance(m, nn.Conv2d | nn.Linear)]
    assert weights == [m.weight.shape for m in plain if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer, following in itertools.pairwise(layers):
        hidden = isinstance(layer, nn.Conv2d | nn.Linear)
        assert hidden == isinstance(following, nn.BatchNorm2d | nn.BatchNorm1d)
    assert layers[-1].bias is not None
