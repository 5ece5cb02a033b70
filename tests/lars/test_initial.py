"""``--init``: which tensors of a file a network takes, its new heads, and the files that are refused."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch
from torch import nn

from lars import models
from lars.comm.world import World
from lars.config.config import Config
from lars.errors import CheckpointError, UsageError
from lars.models.pretrained import network_of, pretrained_file
from lars.run import initial
from lars.run.resume import LoadedCheckpoint
from lars.run.weights import compare


def small(classes: int, name: str = "small_cnn_bn") -> nn.Module:
    return models.build(name, classes)


def config(init: object = "weights.pth", **more) -> Config:
    return Config(**{"model": "small_cnn_bn", "init": str(init), **more})


@pytest.fixture
def loaded(tmp_path):
    """``loaded(content, model, classes)`` saves `content` and loads it into `model` as --init does."""

    def load(content, model: nn.Module, classes: int = 4, name: str = "small_cnn_bn"):
        torch.save(content, tmp_path / "weights.pth")
        flags = config(tmp_path / "weights.pth", model=name)
        return initial.load(flags, model, classes, World())

    return load


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that are equal in the network and in the file."""
    return {n for n, tensor in model.state_dict().items() if torch.equal(tensor, state.get(n))}


def test_everything_is_taken_from_a_file_that_fits(loaded, tmp_path):
    state, model = small(4).state_dict(), small(4)
    record = loaded({"model": state}, model)
    assert same(model, state) == set(state)
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    assert record == {
        "from": str(tmp_path / "weights.pth"), "sha256": digest, "network": "val",
        "new_heads": [], "missing": [], "unexpected": [],
    }  # fmt: skip


def test_a_head_with_another_number_of_classes_is_replaced_and_named(loaded):
    state, model = small(7).state_dict(), small(4)
    before = model[-1].weight.clone()
    record = loaded(state, model)
    assert record["new_heads"] == ["17"]
    assert record["missing"] == record["unexpected"] == []
    assert same(model, state) == set(state) - {"17.weight", "17.bias"}
    assert torch.equal(model[-1].weight, before)


def test_the_average_of_the_weights_is_preferred(loaded):
    model, average = small(4), small(4).state_dict()
    record = loaded({"state_dict": small(4).state_dict(), "state_dict_ema": average}, model)
    assert record["network"] == "val_ema"
    assert same(model, average) == set(average)


@pytest.mark.parametrize("prefix", ["backbone.", "model.", "module.encoder.", "_orig_mod.", ""])
def test_prefixes_are_removed_and_a_backbone_without_a_head_is_taken(loaded, prefix):
    state, model = small(4).state_dict(), small(4)
    body = {n: v for n, v in state.items() if not n.startswith("17.")}
    content = {prefix + name: value for name, value in body.items()}
    record = loaded({**content, "projector.0.weight": torch.ones(1)}, model)
    assert same(model, state) == set(body)
    assert (record["new_heads"], record["unexpected"]) == (["17"], ["projector.0.weight"])


class TwoHeads(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.auxiliary, self.head = nn.Linear(3, classes), nn.Linear(3, classes)


def test_auxiliary_heads_are_replaced_too(loaded):
    state, model = TwoHeads(7).state_dict(), TwoHeads(4)
    assert loaded(state, model)["new_heads"] == ["auxiliary", "head"]
    assert same(model, state) == {"body.weight", "body.bias"}


def test_auxiliary_heads_of_torchvisions_files_are_left_out():
    import torchvision

    with torch.device("meta"):
        state = torchvision.models.googlenet(init_weights=False).state_dict()
        model = small(4, "googlenet")
    assert initial.new_heads(model, state, 4) == ["fc"]
    fit = compare(state, model.state_dict())
    assert (fit.missing, fit.shapes) == ([], ["fc.weight", "fc.bias"])
    assert {name.split(".")[0] for name in fit.unexpected} == {"aux1", "aux2"}


def test_what_is_missing_is_listed_and_keeps_its_values(loaded):
    state, model = small(4).state_dict(), small(4)
    nn.init.constant_(model[1].bias, 3.0)
    del state["1.bias"]
    assert loaded(state, model)["missing"] == ["1.bias"]
    assert torch.equal(model[1].bias, torch.full((16,), 3.0))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("resnet18", ["--model small_cnn_bn", "missing (0.weight", "those of resnet18: use --model resnet18"]),
        ("small_cnn", ["missing", "use the --model"]),
        ({"none.weight": torch.ones(2)}, ["1 unexpected (none.weight)"]),
        ({"epoch": 3}, ["holds no weights"]),
    ],
)  # fmt: skip
def test_other_networks_are_refused_before_a_tensor_changes(loaded, content, words):
    model = small(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if isinstance(content, str):
        content = small(10, content).state_dict()
    with pytest.raises((UsageError, CheckpointError)) as refused:
        loaded(content, model)
    assert all(word in str(refused.value) for word in ["--init", *words]), refused.value
    assert same(model, before) == set(before)


def test_a_smaller_network_of_the_same_family_is_refused(loaded):
    """More than half of ResNet-101 would be filled with the weights of ResNet-50."""
    state = small(4, "resnet50").state_dict()
    with torch.device("meta"):
        model = small(4, "resnet101")
    with pytest.raises(UsageError, match=r"missing \(layer3.6.conv1.*those of resnet50"):
        loaded(state, model, 4, "resnet101")


def test_a_larger_network_of_the_same_family_is_refused_unless_the_network_is_the_users(loaded):
    """A file of ResNet-34 has every tensor of ResNet-18."""
    with torch.device("meta"):
        state, model = small(4, "resnet34").state_dict(), small(4, "resnet18")
    with pytest.raises(
        UsageError, match=r"96 unexpected .*those of resnet34: use --model resnet34"
    ):
        loaded(state, model, 4, "resnet18")
    state = {name: torch.zeros(tensor.shape) for name, tensor in state.items()}
    found = loaded(state, small(4, "resnet18"), 4, "my_networks:net")
    assert len(found["unexpected"]) == 96


def test_weights_that_are_not_finite_are_refused(loaded):
    state = small(4).state_dict()
    state["0.bias"][1] = torch.nan
    with pytest.raises(UsageError, match=r"not finite in 1 of its tensors \(0.bias\)"):
        loaded(state, small(4))


def test_the_network_of_a_file_is_found_whatever_its_head():
    with torch.device("meta"):
        state = small(5, "shufflenet_v2_x0_5").state_dict()
    state = {name: value for name, value in state.items() if "num_batches" not in name}
    assert network_of(state) == "shufflenet_v2_x0_5"
    assert network_of(small(4).state_dict()) == ""


def checkpoint_of(init: str | None, digest: str | None) -> LoadedCheckpoint:
    state = {"said": {"flags": {"init": init}}, "same_run": {"init": digest}}
    return LoadedCheckpoint("checkpoint-1", state)


def test_a_run_is_identified_by_the_content_of_the_file(tmp_path):
    path, other = tmp_path / "a.pth", tmp_path / "b.pth"
    path.write_bytes(b"weights")
    other.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()[:16]
    assert initial.identity(config(path), None) == digest == initial.identity(config(other), None)
    assert initial.identity(Config(), None) is None
    resumed = checkpoint_of(str(path), "as before")
    assert initial.identity(config(other), resumed) == digest
    path.unlink()
    assert initial.identity(config(path), resumed) == "as before", "the file is not read again"
    other.unlink()
    assert "no such file" in initial.identity(config(other), resumed)
    with pytest.raises(CheckpointError, match=r"--init .*a.pth does not exist; name a file"):
        initial.identity(config(path), None)


def test_a_missing_file_is_reported_early_unless_the_run_can_resume(tmp_path):
    flags = config(tmp_path / "no.pth", log_dir=str(tmp_path), run_name="run")
    for wrong, words in ((flags, "does not exist"), (config(tmp_path), "is a folder")):
        with pytest.raises(CheckpointError, match=words):
            initial.check(wrong)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-1.pth.tar").touch()
    initial.check(flags)


@pytest.mark.parametrize("other", [{"resume": "x"}, {"branch": "x"}, {"evaluate": "x"}])
def test_flags_that_choose_other_weights_are_refused(other):
    (name,) = other
    with pytest.raises(UsageError, match=f"--init and --{name} cannot be used together"):
        config(**other)
    assert config(resume="never").init


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch.hub, from which no network can be reached."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(url: str, path: str, *_, **__) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return tmp_path / "checkpoints"


def test_published_weights_are_taken_from_the_cache_of_torch_hub(hub, monkeypatch):
    flags = config("IMAGENET1K_V1", model="resnet18")
    path = hub / "resnet18-f37072fd.pth"
    with pytest.raises(UsageError) as refused:
        initial.check(flags)
    for words in (
        "https://download.pytorch.org/models/resnet18-f37072fd.pth",
        "not known",
        "--init with",
    ):
        assert words in str(refused.value)

    def download(url: str, path: str, digest: str, progress: bool) -> None:
        assert (url.rpartition("/")[2], digest) == ("resnet18-f37072fd.pth", "f37072fd")
        torch.save(small(1000, "resnet18").state_dict(), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    initial.check(flags)
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    model = small(4, "resnet18")
    assert initial.load(flags, model, 4, World())["new_heads"] == ["fc"]
    assert same(model, torch.load(path, weights_only=True)).isdisjoint({"fc.weight", "fc.bias"})
    assert len(initial.identity(flags, None)) == 16


def test_unknown_published_weights_are_refused_with_the_known_ones(hub):
    with pytest.raises(UsageError, match="--model resnet50; torchvision has: IMAGENET1K_V1, IMA"):
        pretrained_file("resnet50", "IMAGENET1K_V9")
    with pytest.raises(UsageError, match="torchvision has none"):
        initial.check(dataclasses.replace(config("DEFAULT"), log_dir=str(hub)))
