"""``--model package.module:function``, the head of a network, and ``--freeze-backbone``."""

from __future__ import annotations

import copy
import dataclasses
import sys

import pytest
import torch
from torch import nn

from lars import models
from lars.comm.world import World
from lars.config.config import Config
from lars.config.plan import make_plan
from lars.errors import UsageError
from lars.learner import build
from lars.learner.classification import freeze_backbone
from lars.learner.imported import make_imported
from lars.learner.memory import memory_of
from lars.models.head import freeze_all_but, heads_of
from lars.run.export import export_weights
from lars.run.identity import run_name

MODULE = '''
import torch
from torch import nn


class Net(nn.Module):
    """A user's network: a token, LayerScale, tied layers, and values that a meta tensor lacks."""

    def __init__(self, num_classes, width=6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(width))
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.head = nn.Linear(width, num_classes)

    def no_weight_decay(self):
        return {"token"}

    def forward(self, images):
        x = self.bn(self.stem(images)).mean((2, 3)) + self.token[0, 0]
        if x.abs().max().item() > 1e9:
            x = x / 2
        return self.head(self.scale * self.second(self.first(x)))


def small(num_classes):
    return Net(num_classes, width=4)


def no_argument():
    return Net(10)


def no_network(num_classes):
    return [num_classes]


def other_width(num_classes):
    return Net(num_classes + 1)


class Pair(Net):
    def forward(self, images):
        scores = super().forward(images)
        return (scores, scores) if self.training else scores


class Probabilities(Net):
    def forward(self, images):
        return super().forward(images).softmax(1)


class ProbabilitiesInEvaluation(Net):
    def forward(self, images):
        scores = super().forward(images)
        return scores if self.training else scores.softmax(1)


def only_large_images(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 64), nn.Flatten(), nn.Linear(4, num_classes))


number = 3
'''


class Source:
    """The parts of a source that building a learner needs."""

    num_classes, image_size, mean, std, views, train_size = 5, 32, (0.0,) * 3, (1.0,) * 3, 1, 8


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A module in the current folder, which is not on the search path yet."""
    (tmp_path / "my_networks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    yield
    sys.modules.pop("my_networks", None)


def config(model: str, **more) -> Config:
    usual = {"batch_size": 4, "base_lr": 0.1, "warmup_epochs": 0.0, "lr_schedule": "constant"}
    return Config(**{"model": model, "no_cuda": True, "epochs": 1, **usual, **more})


def learner_of(flags: Config):
    source = Source()
    return build.learner(flags, make_plan(flags, size=1, train_size=8), source, World())


BATCH = (torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 4]))


def test_a_network_of_the_user_is_trained_averaged_and_exported(tmp_path):
    for name in ("my_networks:Net", "my_networks:small"):
        learner = learner_of(config(name, base_op="lars", ema_decay=0.5))
        assert learner.step([BATCH], 0, count=1, samples=4).taken
        assert int(learner.model.bn.num_batches_tracked) == 1, "the trial leaves no trace"
        assert memory_of(learner, BATCH[0].shape).weights > 0
        export_weights(tmp_path / "x.safetensors", learner.model, None, [])
    assert run_name(config("my_networks:Net")).startswith("Net_sgd_")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:Net", ["the module no_such_module cannot be imported", "folder of the module"]),
        ("my_networks:Nett", ["my_networks has no Nett; did you mean my_networks:Net?"]),
        ("my_networks.net", ["needs a colon", "--model my_networks:net"]),
        ("my_networks:number", ["is an object of type int; name a function"]),
        ("my_networks:number.net", ["my_networks has no number.net; correct the name"]),
        ("my_networks:", ["write package.module:Name"]),
        ("my_networks:no_argument", ["failed with num_classes=5 (TypeError", "take the argument num_classes"]),
        ("my_networks:no_network", ["gives an object of type list instead of a torch.nn.Module"]),
        ("my_networks:other_width", ["returns (2, 6) for two images in training", "(2, 5)"]),
        ("my_networks:Pair", ["returns tuple for two images in training"]),
        ("my_networks:Probabilities", ["returns probabilities in training", "remove the one at the end"]),
        ("my_networks:ProbabilitiesInEvaluation", ["returns probabilities in evaluation"]),
        ("my_networks:only_large_images", ["fails on two images of 32 x 32 pixels (RuntimeError"]),
        ("resnet5", ["did you mean resnet50?", "package.module:function"]),
    ],
)  # fmt: skip
def test_a_network_that_cannot_be_used_is_refused_with_its_cause(name, words):
    with pytest.raises(UsageError) as refused:
        build.setup(config(name), Source(), World())
    assert all(word in str(refused.value) for word in [f"--model {name}", *words]), refused.value


@pytest.mark.parametrize("base_op", ["lars", "torch.optim:SGD"])
def test_the_trainer_excludes_what_the_network_names_and_one_dimensional_parameters(base_op):
    flags = config("my_networks:Net", base_op=base_op)
    model = build.build_model(flags, 5)
    make = make_imported if ":" in base_op else build.make_optimizer
    names = {id(p): name for name, p in model.named_parameters()}
    adapted, others = make(flags, model, 0.1).param_groups
    found = {names[id(p)] for p in adapted["params"]}
    assert found == {"stem.weight", "first.weight", "head.weight"}
    assert {"token", "scale", "bn.weight"} <= {names[id(p)] for p in others["params"]}
    assert others["weight_decay"] == 0
    flags = dataclasses.replace(flags, bn_bias_separately=False)
    (together,) = make(flags, model, 0.1).param_groups
    assert len(together["params"]) == len(names)


HEADS = {
    "resnet18": "fc", "squeezenet1_0": "classifier.1", "vit_b_16": "heads.head", "vgg11": "classifier.6",
    "densenet121": "classifier", "swin_t": "head", "convnext_tiny": "classifier.2",
    "mobilenet_v3_small": "classifier.3", "small_cnn_bn": "17", "alexnet_bn": "28",
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_the_layer_of_the_class_scores(name):
    with torch.device("meta"):
        model = models.build(name, 12)
    (found,) = heads_of(model, 12)
    layer = model.get_submodule(found)
    assert (found, layer.weight.shape[0]) == (HEADS[name], 12)
    assert heads_of(model, 13) == []


def test_a_network_may_declare_its_heads():
    model = nn.ModuleDict({"head": nn.Linear(2, 3), "distilled": nn.Linear(2, 3), "x": nn.ReLU()})
    assert heads_of(model, 3) == ["distilled"]
    model.get_classifier = lambda: (model["head"], model["distilled"])
    assert heads_of(model, 3) == ["head", "distilled"]


@pytest.mark.parametrize("name", ["my_networks:Net", "small_cnn_bn"])
def test_only_the_head_is_trained_and_the_rest_computes_as_in_evaluation(name):
    learner = learner_of(config(name, freeze_backbone=True, ema_decay=0.5, base_op="lars"))
    (head,) = heads_of(learner.model, 5)
    of_head = {f"{head}.weight", f"{head}.bias"}
    assert len(learner.gradients.parameters) == 2
    assert sum(len(group["params"]) for group in learner.optimizer.param_groups) == 2
    before = {n: tensor.clone() for n, tensor in learner.model.state_dict().items()}
    learner.model.eval()
    learner.model.train()  # as after a validation
    for step in range(2):
        assert learner.step([BATCH], step, count=1, samples=4).taken
    for network in learner.networks().values():
        after = network.state_dict()
        assert {n for n in after if not torch.equal(after[n], before[n])} == of_head
    resumed = learner_of(config(name, freeze_backbone=True, ema_decay=0.5, base_op="lars"))
    resumed.load_state_dict(copy.deepcopy(learner.state_dict()))
    for each in (learner, resumed):
        each.step([BATCH], 2, count=1, samples=4)
    assert torch.equal(
        learner.model.get_submodule(head).weight, resumed.model.get_submodule(head).weight
    )
    activations = memory_of(learner, BATCH[0].shape).activations or 0  # unknown for my_networks:Net
    assert activations < 100_000, "only the head saves values"


def test_a_frozen_network_keeps_its_type_and_copies_are_independent():
    model = models.build("resnet18", 3)
    freeze_all_but(model, ["fc"])
    twin = copy.deepcopy(model)
    twin.eval()
    assert type(model).__name__ == "ResNet"
    assert isinstance(twin, type(models.build("resnet18", 3)))
    assert (model.training, model.fc.training, model.bn1.training) == (True, True, False)
    assert (twin.training, twin.fc.training) == (False, False)
    twin.train()
    assert (twin.training, twin.fc.training, twin.layer1.training) == (True, True, False)
    assert list(twin.state_dict()) == list(models.build("resnet18", 3).state_dict())


def test_what_cannot_be_frozen_is_refused():
    model = nn.Sequential(nn.Linear(2, 7), nn.Linear(7, 2))
    with pytest.raises(UsageError, match=r"head of --model mine is not recognised.*7 outputs"):
        freeze_backbone(model, "mine", 7)
    with pytest.raises(UsageError, match="--sync-bn has no effect with --freeze-backbone"):
        config("resnet18", freeze_backbone=True, sync_bn=True)
