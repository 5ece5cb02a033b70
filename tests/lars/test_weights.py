"""Weights from files: our checkpoints and exports, the files of other programs, and files that are refused."""

from __future__ import annotations

import argparse
import fractions

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from conftest import GOLDENS
from lars.errors import CheckpointError, UsageError
from lars.models import build
from lars.run import checkpoint
from lars.run.weights import Weights, load_into, read, refuse_other_classes


def small(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Linear(2, classes))


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return small()


def prefixed(state, prefix: str):
    return {prefix + name: value for name, value in state.items()}


LAYOUTS = {
    "a state_dict": lambda state: state,
    "DistributedDataParallel": lambda state: prefixed(state, "module."),
    "pytorch/examples": lambda state: {
        "epoch": 3, "best_acc1": torch.tensor(9.0), "optimizer": {}, "state_dict": prefixed(state, "module."),
    },
    "Horovod's example": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": []}},
    "torchvision's references": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
    "timm": lambda state: {"arch": "resnet18", "state_dict": state, "args": argparse.Namespace(lr=0.1)},
    "a dict with net": lambda state: {"net": state, "acc_list": [1.0], "time_to_train": [2.0]},
    "Lightning": lambda state: {"state_dict": prefixed(state, "model."), "epoch": 3},
    "a value besides the tensors": lambda state: state | {"0._extra_state": None},
    "settings under model": lambda state: {"model": {"depth": 18}, "net": state},
    "torch.compile": lambda state: {"state_dict": prefixed(state, "_orig_mod.module.")},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_of_other_programs_are_read(tmp_path, model, layout):
    torch.save(LAYOUTS[layout](dict(model.state_dict())), tmp_path / "weights.pth")
    found = read(tmp_path / "weights.pth")
    assert list(found.networks) == ["val"]
    other = small()
    load_into(other, found, "val", "weights.pth", "small")
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(m.state_dict().values() for m in (model, other)), strict=True)
    )


def test_a_wrapper_within_the_network_is_removed(tmp_path):
    torch.save({"features.module.0.weight": torch.ones(1)}, tmp_path / "alexnet.pth")
    assert list(read(tmp_path / "alexnet.pth").networks["val"]) == ["features.0.weight"]


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema"])
def test_a_moving_average_is_a_network_of_its_own(tmp_path, model, key):
    average = AveragedModel(model, use_buffers=True)
    nn.init.zeros_(average.module[2].bias)
    content = {"model": model.state_dict(), key: average.state_dict()}
    torch.save(content, tmp_path / "weights.pth")
    networks = read(tmp_path / "weights.pth").networks
    assert networks["val"].keys() == networks["val_ema"].keys() == model.state_dict().keys()
    assert not networks["val_ema"]["2.bias"].any()
    assert networks["val"]["2.bias"].any()


def test_safetensors_are_read_with_their_class_names(tmp_path, model):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(
        model.state_dict(), path, {"description": '{"classes": ["a", "b", "c"]}'}
    )
    found = read(path)
    assert found.classes == ["a", "b", "c"]
    assert torch.equal(found.networks["val"]["0.weight"], model[0].weight)
    safetensors.torch.save_file(model.state_dict(), path, {"description": "a fine model"})
    assert read(path).classes == []


def test_a_checkpoint_of_an_earlier_version_is_read_with_the_mean_statistics_of_its_ranks():
    path = GOLDENS / "old_run" / "checkpoint-1+1.pth.tar"
    found = read(path)
    assert found.model == "shufflenet_v2_x0_5"
    saved = checkpoint.load(path)
    assert torch.equal(found.statistics["val"], saved["ranks"].mean(0)[4:])


def test_old_files_without_counters_of_batch_norm_are_accepted(model):
    state = {n: v for n, v in model.state_dict().items() if "num_batches" not in n}
    load_into(small(), Weights({"val": state}), "val", "resnet18.pth", "resnet18")


def test_weights_that_do_not_fit_are_named_with_the_fix(model):
    state = {"0.weight": torch.zeros(2, 5), "head.bias": torch.zeros(1)}
    with pytest.raises(UsageError) as refused:
        load_into(model, Weights({"val": state}, model="resnet50"), "val", "x.pth", "small")
    message = str(refused.value)
    for words in (
        "--evaluate x.pth", "--model small", "7 missing (0.bias, 1.weight, 1.bias, ...)", "1 unexpected (head.bias)",
        "0.weight has shape (2, 5) instead of (2, 4)", "use --model resnet50",
    ):  # fmt: skip
        assert words in message


def test_a_head_of_another_size_is_named(model):
    with pytest.raises(
        UsageError, match=r"2.weight has shape \(5, 2\) instead of \(3, 2\).*data set for which"
    ):
        load_into(model, Weights({"val": small(5).state_dict()}), "val", "x.pth", "small")


def test_another_network_of_torchvision_is_named():
    with torch.device("meta"):
        state, model = build("resnet18", 5).state_dict(), build("resnet34", 5)
    with pytest.raises(UsageError, match=r"missing.*use --model resnet18"):
        load_into(model, Weights({"val": state}), "val", "x.pth", "resnet34")


def test_classes_with_other_labels_are_refused():
    weights = Weights({}, classes=["ant", "bee", "cat"])
    refuse_other_classes("x", weights, ["ant", "bee", "cat"])
    refuse_other_classes("x", weights, [])
    refuse_other_classes("x", weights, ["n01", "n02", "n03"])
    with pytest.raises(
        UsageError, match="--evaluate x: it has 3 classes, but the validation images have 2"
    ):
        refuse_other_classes("x", weights, ["ant", "bee"])
    with pytest.raises(
        UsageError, match="class cat has label 2 in the file, but 1 in the validation"
    ):
        refuse_other_classes("x", weights, ["ant", "cat", "bee"])


def damaged(path) -> None:
    checkpoint.save(path, {"learner": torch.zeros(1000)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_off(path) -> None:
    torch.save(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])


def traced(path) -> None:
    torch.jit.trace(small().eval(), torch.ones(1, 4)).save(path)


BAD_FILES = {
    "text": (lambda path: path.write_text("no weights"), r"not a file of weights, or it is damaged \(\w+"),
    "empty": (lambda path: path.write_bytes(b""), r"not a file of weights, or it is damaged \(EOFError"),
    "cut off": (cut_off, r"or it is damaged \(RuntimeError: PytorchStreamReader[^.]*\); copy it again"),
    "TorchScript": (traced, r"needs code \(a TorchScript program"),
    "no tensors": (lambda path: torch.save({"state_dict": {}}, path), "holds no weights: it has state_dict"),
    "code": (lambda path: torch.save(fractions.Fraction(1, 2), path), r"needs code \(fractions.Fraction\).*state_dict"),
    "whole model": (lambda path: torch.save(small(), path), r"needs code \(torch.nn.modules.container.Sequential\)"),
    "a list": (lambda path: torch.save([1], path), "holds an object of type list, not weights"),
    "no weights": (lambda path: torch.save({"epoch": 3, "loss": 0.1}, path), "holds no weights: it has epoch, loss"),
    "damaged": (damaged, "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_other_files_are_refused_with_the_reason(tmp_path, kind):
    write, words = BAD_FILES[kind]
    write(tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path / "weights.pth")


def test_a_broken_safetensors_file_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path / "x.safetensors")
