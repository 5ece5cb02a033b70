"""Parameter groups, and optimizers by name."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

import lars
from conftest import ROOT, golden
from lars import (
    LAMB,
    LARS,
    OPTIMIZERS,
    TVLARS,
    LARSWrapper,
    PolynomialWarmup,
    create_lamb_optimizer,
    create_optimizer,
    create_optimizer_lars,
    parameter_groups,
)
from lars.optim.groups import KINDS

GOLDEN = golden("param_groups.json")


class Mixed(nn.Module):
    """The module of the golden file: one layer of every relevant kind."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm1d(4)
        self.bn2 = nn.BatchNorm2d(4)
        self.bn3 = nn.BatchNorm3d(4)
        self.ln = nn.LayerNorm(4)
        self.gn = nn.GroupNorm(2, 4)
        self.inorm = nn.InstanceNorm2d(4, affine=True)
        self.sync = nn.SyncBatchNorm(4)
        self.emb = nn.Embedding(5, 4)
        self.rebias = nn.Linear(4, 4, bias=False)
        self.lstm = nn.LSTM(4, 4)
        self.mha = nn.MultiheadAttention(4, 2)
        self.fc = nn.Linear(4, 2)


def names(model: nn.Module, groups: list[dict[str, Any]]) -> list[list[str]]:
    by_id = {id(param): name for name, param in model.named_parameters()}
    return [[by_id[id(param)] for param in group["params"]] for group in groups]


# Deliberate differences from the published NUS groups.
NORMS_THERE_ADAPTED = {"gn.weight", "inorm.weight", "sync.weight"}
WEIGHT_THERE_EXCLUDED = {"rebias.weight"}
THERE_IN_A_GROUP = {"frozen"}


def test_norms_and_biases_are_excluded_as_in_nus_except_for_the_named_differences() -> None:
    model = Mixed()
    adapted, excluded = names(model, parameter_groups(model))
    adapted_there, excluded_there = (set(group) for group in GOLDEN["nus_lars_bn_bias_separately"])
    assert set(adapted) == (
        adapted_there - NORMS_THERE_ADAPTED - THERE_IN_A_GROUP | WEIGHT_THERE_EXCLUDED
    )
    assert set(excluded) == excluded_there - WEIGHT_THERE_EXCLUDED | NORMS_THERE_ADAPTED
    order = [name for name, _ in model.named_parameters()]
    assert adapted == sorted(adapted, key=order.index)
    assert excluded == sorted(excluded, key=order.index)


def test_nothing_excluded_is_one_group() -> None:
    model = Mixed()
    [adapted] = names(model, parameter_groups(model, exclude=()))
    [there] = GOLDEN["nus_lars_together"]
    assert adapted == [name for name in there if name not in THERE_IN_A_GROUP]


def test_only_norms_excluded() -> None:
    model = Mixed()
    _, excluded = names(model, parameter_groups(model, exclude=["norm"]))
    norms = ("bn1.", "bn2.", "bn3.", "ln.", "gn.", "inorm.", "sync.")
    assert excluded == [name for name, _ in model.named_parameters() if name.startswith(norms)]
    assert set(GOLDEN["nus_lamb_norms_only"][1]) <= set(excluded)


def test_the_groups_of_resnet50_are_those_of_nus() -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = models.resnet50()
    golden = GOLDEN["resnet50"]
    groups = parameter_groups(model, 1e-4)
    assert names(model, groups) == [golden["adapted"], golden["excluded"]]
    assert [len(group["params"]) for group in groups] == golden["counts"] == [54, 107]
    assert [sum(p.numel() for p in group["params"]) for group in groups] == golden["elements"]
    in_lars = lars.LARS(groups, lr=0.1).param_groups
    assert [(group["weight_decay"], group["adapt"]) for group in in_lars] == [
        (1e-4, True),
        (0.0, False),
    ]


def test_rms_norms_are_norms() -> None:
    _, excluded = parameter_groups(nn.Sequential(nn.Linear(2, 2, bias=False), nn.RMSNorm(2)))
    assert len(excluded["params"]) == 1


@pytest.mark.parametrize("word", ["norm", "bias", "1d", "no_weight_decay"])
def test_a_single_word_needs_no_list(word: str) -> None:
    model = Mixed()
    assert names(model, parameter_groups(model, exclude=word)) == names(
        model, parameter_groups(model, exclude=[word])
    )


class HomeMadeRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.matrix = nn.Parameter(torch.ones(4, 4))  # no norm layer has one


class NormalizedLinear(HomeMadeRMSNorm):
    """Not a norm layer, although its name resembles one."""


class Transformer(nn.Module):
    """What timm's rule knows: a class token, LayerScale, and a norm layer that is not torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.norm = HomeMadeRMSNorm()
        self.linear = NormalizedLinear()
        self.head = nn.Linear(4, 2)

    def no_weight_decay(self) -> set[str]:
        return {"token", "linear.m*", "missing"}


@pytest.mark.parametrize(
    ("exclude", "excluded"),
    [
        (("norm", "bias"), ["norm.weight", "head.bias"]),
        ("1d", ["scale", "norm.weight", "linear.weight", "head.bias"]),
        ("no_weight_decay", ["token", "linear.matrix"]),
        (
            ("norm", "bias", "1d", "no_weight_decay"),
            ["token", "scale", "norm.weight", "linear.weight", "linear.matrix", "head.bias"],
        ),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_each_word_excludes(
    exclude: str | tuple[str, ...], excluded: list[str], wrapped: bool
) -> None:
    model = Transformer()
    outer = nn.ModuleDict({"module": model}) if wrapped else model  # as DistributedDataParallel
    assert names(model, parameter_groups(outer, exclude=exclude))[1] == excluded


class EveryKind(nn.Module):
    """A parameter of each kind on which the networks of timm and the default rule differ."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))  # ViT, DeiT, CaiT, CoaT
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.block = nn.ModuleDict({"mlp": nn.Linear(4, 4), "conv": nn.Conv2d(4, 4, 1)})
        self.block.gamma = nn.Parameter(torch.ones(4))  # LayerScale: ConvNeXt, DeiT-3, XCiT, BEiT
        self.block.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))  # Swin, MaxViT
        self.block.attention_biases = nn.Parameter(torch.zeros(2, 9))  # LeViT
        self.block.skipinit_gain = nn.Parameter(torch.zeros(()))  # NFNet
        self.norm = HomeMadeRMSNorm()
        self.act = nn.PReLU(4)
        self.head = nn.Linear(4, 2)

    def no_weight_decay(self) -> set[str]:
        tables = {"block.relative_position_bias_table", "block.attention_biases"}
        return {"cls_token", "pos_embed", *tables}


def test_all_words_together_are_the_rule_of_timm() -> None:
    """The rule is written out here, because timm is not a dependency."""
    model = EveryKind()
    theirs = [
        name
        for name, param in model.named_parameters()
        if param.ndim <= 1 or name.endswith(".bias") or name in model.no_weight_decay()
    ]
    assert names(model, parameter_groups(model, exclude=KINDS))[1] == theirs
    default = names(model, parameter_groups(model))[1]
    assert set(theirs) - set(default) == {
        *("cls_token", "pos_embed", "block.relative_position_bias_table", "block.attention_biases"),
        *("block.gamma", "block.skipinit_gain", "act.weight"),
    }


def test_the_words_do_not_change_the_groups_of_the_trainers_resnets() -> None:
    models = pytest.importorskip("torchvision.models")
    every = ("norm", "bias", "1d", "no_weight_decay")
    for name in ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"):
        with torch.device("meta"):
            model = getattr(models, name)()
        assert parameter_groups(model, exclude=every) == parameter_groups(model)


def test_a_shared_parameter_is_in_one_group_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    [group] = parameter_groups(model)
    assert len(group["params"]) == 1


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(
        ValueError, match=r"exclude=\['bn'\] is not known; choose from: norm, bias, 1"
    ):
        parameter_groups(nn.Linear(2, 2), exclude=["bn"])


@pytest.mark.parametrize(
    ("layers", "excluded"),
    [
        (["bn", "ln", "bias"], ["conv.bias", "bn1", "fc.bias"]),
        (["bn", "ln"], ["bn1"]),
        ([], []),
    ],
)
def test_create_lamb_optimizer_excludes_layers_by_word(
    layers: list[str], excluded: list[str]
) -> None:
    """As in the published function, any word excludes norms, and "bias" excludes biases too."""
    optimizer = create_lamb_optimizer(Mixed(), lr=0.1, weight_decay=0.01, exclude_layers=layers)
    model_names = names_of(optimizer)
    for name in excluded:
        assert any(name in param for param in model_names)
    assert bool(model_names) == bool(excluded)


def names_of(optimizer: LAMB) -> list[str]:
    """The names of the excluded parameters, found with a second model of the same kind."""
    if len(optimizer.param_groups) == 1:
        return []
    model = Mixed()
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    count = len(optimizer.param_groups[1]["params"])
    norm_only = len(parameter_groups(model, exclude=["norm"])[1]["params"])
    exclude = ["norm"] if count == norm_only else ["norm", "bias"]
    wanted = {id(p) for p in parameter_groups(model, exclude=exclude)[1]["params"]}
    assert count == len(wanted)
    return [n for n, p in trainable if id(p) in wanted]


def test_unknown_layers_are_refused_by_create_lamb_optimizer() -> None:
    known = "choose from: bn, ln, norm, bias"
    with pytest.raises(ValueError, match=rf"exclude_layers=\['head'\] is not known; {known}"):
        create_lamb_optimizer(Mixed(), lr=0.1, exclude_layers=["head", "bn"])
    with pytest.raises(ValueError, match=r"exclude_layers=\['head'\] is not known"):
        create_lamb_optimizer(Mixed(), lr=0.1, exclude_layers="head")
    one, several = (
        create_lamb_optimizer(Mixed(), lr=0.1, exclude_layers=layers) for layers in ("bn", ["bn"])
    )
    assert names_of(one) == names_of(several) != []


CLASSES = {
    "sgd": SGD,
    "lars": LARS,
    "lamb": LAMB,
    "tvlars": TVLARS,
    "adam": Adam,
    "adamw": AdamW,
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
}


def test_the_names_of_optimizers() -> None:
    assert tuple(CLASSES) == OPTIMIZERS == lars.optim.OPTIMIZERS


@pytest.mark.parametrize("name", CLASSES)
def test_every_name_builds_its_class_and_takes_a_step(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
    model.to(torch.float64).to(memory_format=torch.channels_last)
    optimizer = create_optimizer(name, model, lr=0.1, weight_decay=0.01)
    assert type(optimizer) is CLASSES[name]
    matrices, others = optimizer.param_groups
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    before = [p.clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 5, 5, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, new)
        assert new.isfinite().all()


def test_options_by_name_reach_the_optimizer() -> None:
    model = nn.Linear(2, 2)
    options = {"lr": 0.5, "momentum": 0.8, "weight_decay": 0.1, "eps": 1e-3}
    for name in ("sgd", "lars", "tvlars"):
        assert create_optimizer(name, model, **options).param_groups[0]["momentum"] == 0.8
    for name in ("lars", "lamb", "adam", "adamw", "adagrad", "rmsprop"):
        assert create_optimizer(name, model, **options).param_groups[0]["eps"] == 1e-3
    assert create_optimizer("lars", model, lr=0.5).param_groups[0]["eps"] == 1e-5
    assert create_optimizer("lars", model, lr=0.5, eps=0.0).param_groups[0]["eps"] == 0.0
    assert create_optimizer("lamb", model, lr=0.5).param_groups[0]["eps"] == 1e-6
    assert create_optimizer("rmsprop", model, lr=0.5).param_groups[0]["momentum"] == 0
    together = create_optimizer("lars", model, lr=0.5, bn_bias_separately=False)
    assert len(together.param_groups) == 1
    mlperf = create_optimizer("lars", model, lr=0.5, form="mlperf").param_groups[0]
    assert (mlperf["inside"], mlperf["max_ratio"]) == ("both", None)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    known = "sgd, lars, lamb, tvlars, adam, adamw, adagrad, rmsprop"
    with pytest.raises(ValueError, match=f"optimizer='clars' is not known; choose one of: {known}"):
        create_optimizer("clars", nn.Linear(2, 2), lr=0.1)


def test_the_published_usage_of_nus_runs_as_it_is_printed() -> None:
    names: dict[str, Any] = {}
    exec("from lars import *", names)

    class args:
        base_lr, momentum, wd, bn_bias_separately = 0.5, 0.9, 1e-4, True
        epochs, warmup_epochs = 3, 0.5

    names |= {"args": args, "model": Mixed(), "num_steps_per_epoch": 4, "lr_power": 2.0}
    exec(
        """
optimizer = create_optimizer_lars(model=model, lr=args.base_lr,
                                momentum=args.momentum, weight_decay=args.wd,
                                bn_bias_separately=args.bn_bias_separately)
lr_scheduler = PolynomialWarmup(optimizer, decay_steps=args.epochs * num_steps_per_epoch,
                                warmup_steps=args.warmup_epochs * num_steps_per_epoch,
                                end_lr=0.0, power=lr_power, last_epoch=-1)
""",
        names,
    )
    assert isinstance(names["optimizer"], LARS)
    assert isinstance(names["lr_scheduler"], PolynomialWarmup)
    assert names["optimizer"].param_groups[0]["eps"] == 1e-5


def test_the_published_usage_of_torchlars_runs_with_the_wrappers_name() -> None:
    model = nn.Linear(3, 2)
    names: dict[str, Any] = {"model": model, "optim": torch.optim, "input": torch.ones(4, 3)}
    names |= {"target": torch.zeros(4, 2), "loss_fn": nn.MSELoss()}
    before = model.weight.clone()
    exec(
        """
from lars import LARSWrapper

base_optimizer = optim.SGD(model.parameters(), lr=0.1)
optimizer = LARSWrapper(optimizer=base_optimizer, eps=1e-8, trust_coef=0.001)

output = model(input)
loss = loss_fn(output, target)
loss.backward()
optimizer.step()
""",
        names,
    )
    assert isinstance(names["optimizer"], LARSWrapper)
    assert not torch.equal(before, model.weight)


def test_importing_the_package_loads_nothing_and_its_names_need_only_torch() -> None:
    code = """
import sys
import lars
assert "torch" not in sys.modules
from lars import *
for name in lars.__all__:
    assert name in globals(), name
heavy = {"torchvision", "horovod", "mpi4py", "nvidia", "tensorboard", "sklearn"} & set(sys.modules)
assert not heavy, heavy
assert set(lars.__all__) <= set(dir(lars))
try:
    lars.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize(
    ("options", "eps"),
    [
        ({}, 1e-5),
        ({"form": "nus"}, 1e-5),
        ({"form": "torchlars"}, 1e-8),
        ({"form": "mlperf"}, 0.0),
        ({"epsilon": 0.0}, 0.0),
        ({"epsilon": 1e-3, "form": "mlperf"}, 1e-3),
        ({"eps": 1e-3}, 1e-3),
        ({"eps": 0.0}, 0.0),
        ({"eps": None, "form": "mlperf"}, 0.0),
    ],
)
def test_both_functions_have_the_same_default_of_eps(options: dict[str, Any], eps: float) -> None:
    optimizer = create_optimizer_lars(nn.Linear(2, 2), lr=1, **options)
    assert [group["eps"] for group in optimizer.param_groups] == [eps, eps]
    options["eps"] = options.pop("epsilon", options.get("eps"))
    optimizer = create_optimizer("lars", nn.Linear(2, 2), lr=1, **options)
    assert [group["eps"] for group in optimizer.param_groups] == [eps, eps]


def test_eps_under_two_names_is_refused() -> None:
    with pytest.raises(TypeError, match="epsilon and eps are the same option; give one of them"):
        create_optimizer_lars(nn.Linear(2, 2), lr=1, epsilon=0.0, eps=0.0)


def test_adapt_false_applies_to_every_group() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for optimizer in (
        create_optimizer_lars(model, 0.1, adapt=False),
        create_optimizer("lars", model, lr=0.1, adapt=False),
        create_lamb_optimizer(model, 0.1, adapt=False),
    ):
        assert [group["adapt"] for group in optimizer.param_groups] == [False, False]


def test_options_of_create_lamb_optimizer_reach_the_groups() -> None:
    options = {"betas": (0.8, 0.9), "eps": 1e-3}
    optimizer = create_lamb_optimizer(
        nn.Linear(2, 2), 0.3, weight_decay=0.1, form="paper", **options
    )
    for group, decay in zip(optimizer.param_groups, (0.1, 0.0), strict=True):
        assert (
            group | {"lr": 0.3, "weight_decay": decay, "bias_correction": True} | options == group
        )
