"""Barlow Twins: the loss against recorded numbers, real ranks against one process, the linear evaluation."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from conftest import ROOT, golden
from lars import models
from lars.comm.world import World
from lars.config.barlow_twins import BarlowTwinsConfig, LinearConfig, LinearFlags, linear_config
from lars.config.config import Config
from lars.config.plan import make_plan
from lars.errors import UsageError
from lars.learner import build
from lars.learner.barlow_twins import (
    BarlowTwins,
    BarlowTwinsNet,
    LinearNet,
    barlow_twins_loss,
    cross_correlation,
    load_backbone,
    projector,
    without_head,
)


def alone(tensor, name):
    return tensor


def test_the_loss_and_its_gradients_equal_the_recorded_ones():
    recorded = golden("losses.json")["tvlars_barlow_twins_loss"]
    z1, z2 = (
        torch.tensor(recorded[name], dtype=torch.float64, requires_grad=True)
        for name in ("z1", "z2")
    )
    norm = nn.BatchNorm1d(z1.shape[1], affine=False).double()
    c, count = cross_correlation(norm(z1), norm(z2), alone)
    loss = barlow_twins_loss(c, recorded["btlmbda"])
    loss.backward()
    assert count.item() == recorded["bs"]
    assert loss.item() == pytest.approx(recorded["loss"], rel=1e-10)
    for z, name in ((z1, "grad_z1"), (z2, "grad_z2")):
        assert torch.allclose(
            z.grad, torch.tensor(recorded[name], dtype=torch.float64), rtol=1e-10, atol=1e-13
        )


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, 3])
def test_real_ranks_with_unequal_and_empty_shares_equal_a_single_process(mpirun, ranks):
    done = mpirun(ranks, ROOT / "tests" / "ranks" / "barlow_twins.py", timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exact to") == ranks


def test_a_smaller_batch_is_divided_by_its_own_number_of_samples():
    torch.manual_seed(0)
    z = torch.randn(3, 4, dtype=torch.float64)
    assert torch.allclose(cross_correlation(z, z, alone)[0], z.T @ z / 3)
    empty, count = cross_correlation(z[:0], z[:0], alone)
    assert (count.item(), empty.abs().sum().item()) == (0, 0)


def net() -> BarlowTwinsNet:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
    return BarlowTwinsNet(backbone, projector(6 * 36, (8, 5)))


def test_the_correlation_of_a_validation_does_not_depend_on_the_batches():
    network, task = net().eval(), BarlowTwins(lmbda=0.01)
    views, labels = torch.randn(7, 2, 3, 8, 8), torch.zeros(7, dtype=torch.int64)
    whole = task.loss_and_sums(network, (views, labels))[1]["correlation"]
    parts = [
        task.loss_and_sums(network, batch)[1]["correlation"]
        for batch in zip(views.split([2, 5]), labels.split([2, 5]), strict=True)
    ]
    assert torch.allclose(sum(parts), whole, rtol=1e-5)


def test_half_precision_outputs_give_a_full_precision_loss():
    task, network = BarlowTwins(lmbda=0.01), net()
    batch = (torch.randn(8, 2, 3, 8, 8), torch.zeros(8, dtype=torch.int64))
    exact = task.loss_and_sums(network, batch)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = task.loss_and_sums(network, batch)[0]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.1)


@pytest.mark.parametrize(
    ("name", "width"),
    [("resnet18", 512), ("resnet50", 2048), ("efficientnet_b0", 1280), ("alexnet", 4096),
     ("mobilenet_v3_small", 1024), ("vit_b_16", 768), ("small_cnn", 128)],
)  # fmt: skip
def test_the_width_of_the_features_is_found(name, width):
    with torch.device("meta"):
        model, found = without_head(models.build(name, 10), name)
        features = model.eval()(torch.zeros(2, 3, 224, 224))
    assert (found, tuple(features.shape)) == (width, (2, width))
    if name == "efficientnet_b0":
        assert isinstance(model.classifier, nn.Identity), "dropout belongs to the removed part"


def test_a_network_without_a_linear_layer_is_refused():
    with pytest.raises(UsageError, match="--model squeezenet1_0 does not end with a linear layer"):
        without_head(models.build("squeezenet1_0", 10), "squeezenet1_0")


class Source:
    """The parts of a source that building a learner needs."""

    num_classes, image_size, mean, std, views = 10, 32, (0.0,) * 3, (1.0,) * 3, 1


def linear_learner(**more):
    config = LinearConfig(
        model="small_cnn_bn", base_op="sgd", base_lr=0.4, epochs=1, batch_size=4, no_cuda=True,
        warmup_epochs=0.0, lr_schedule="constant", **more,
    )  # fmt: skip
    plan = make_plan(config, size=1, train_size=4)
    return build.learner(config, plan, Source(), World())


BATCH = (torch.rand(4, 3, 32, 32), torch.tensor([0, 3, 5, 9]))


def test_a_frozen_backbone_keeps_its_weights_and_statistics():
    learner = linear_learner()
    learner.model.eval()
    learner.model.train()  # as after a validation
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    assert learner.step([BATCH], 0, count=1, samples=4).taken
    changed = {
        name
        for name, tensor in learner.model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == {"head.weight", "head.bias"}


def test_a_fine_tuned_backbone_has_its_own_learning_rate():
    learner = linear_learner(lr_backbone=0.1)
    assert learner.step([BATCH], 0, count=1, samples=4).taken
    names = {id(p): name for name, p in learner.model.named_parameters()}
    rates = {
        names[id(p)]: group["lr"]
        for group in learner.optimizer.param_groups
        for p in group["params"]
    }
    assert rates.keys() == set(names.values())
    for name, lr in rates.items():
        assert lr == pytest.approx(0.4 if name.startswith("head.") else 0.1), name
    assert int(learner.model.backbone[1].num_batches_tracked) == 1


@pytest.mark.parametrize("optimizer", ["lars", "tvlars", "lamb", "adamw"])
def test_biases_and_norms_have_their_own_learning_rate(optimizer):
    config = BarlowTwinsConfig(
        model="small_cnn_bn", projector="16-8", batch_size=4, epochs=2, base_op=optimizer,
        base_lr=0.2, warmup_epochs=0.0, lr_schedule="constant", no_cuda=True,
    )  # fmt: skip
    plan = make_plan(config, size=1, train_size=8)
    source = Source()
    source.views = 2
    learner = build.learner(config, plan, source, World())
    views = (torch.rand(4, 2, 3, 32, 32), torch.zeros(4, dtype=torch.int64))
    assert learner.step([views], 0, count=1, samples=4).taken
    for group in learner.optimizer.param_groups:
        expected = 0.0048 if group["params"][0].ndim == 1 else 0.2
        assert group["lr"] == pytest.approx(expected)
        assert len({p.ndim == 1 for p in group["params"]}) == 1
        assert group.get("step", 1) == 1, "the groups count their steps separately"
    assert len(learner.optimizer.param_groups) == 2, "one group for each rate"
    other = build.learner(config, plan, source, World())
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    for each in (learner, other):
        each.step([views], 1, count=1, samples=4)
    pairs = zip(learner.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_backbone_of_a_pretraining_is_loaded(tmp_path):
    from safetensors.torch import save_file

    network = net()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    other = net().backbone
    nn.init.zeros_(other[0].weight)
    load_backbone(other, tmp_path / "model.safetensors")
    assert torch.equal(other[0].weight, network.backbone[0].weight)
    with pytest.raises(UsageError, match="run --stage pretraining first"):
        load_backbone(other, tmp_path / "nothing.safetensors")
    with pytest.raises(UsageError, match="--stage linear: the backbone cannot be read"):
        load_backbone(nn.Linear(2, 2), tmp_path / "model.safetensors")


def test_a_frozen_network_stays_in_evaluation_when_it_is_trained():
    network = LinearNet(
        nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()), nn.Linear(2, 2), frozen=True
    )
    assert network.training
    assert not any(part.training for part in network.backbone.modules())


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"projector": "64x64"}, "--projector 64x64 must be widths"),
     ({"projector": "64-0"}, "--projector 64-0 must be widths"),
     ({"sync_bn": False}, "--no-sync-bn"), ({"btlmbda": -1.0}, "--btlmbda must be at least 0"),
     ({"benchmark": "noise"}, "use --benchmark data")],
)  # fmt: skip
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        BarlowTwinsConfig(**flags)


def test_the_ranks_must_be_able_to_form_a_step_of_the_linear_evaluation(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with pytest.raises(UsageError, match=r"--linear-batch-size 256 .* use a multiple of 96"):
        LinearFlags()
    assert LinearFlags(linear_batch_size=288).micro_batch == 32


def test_the_flags_of_a_config_keep_their_names_and_help():
    known = {f.name: f.metadata for f in dataclasses.fields(Config)}
    for own in dataclasses.fields(BarlowTwinsConfig):
        if own.name in known:
            assert own.metadata["group"] == known[own.name]["group"]
            assert set(own.metadata["aliases"]) >= set(known[own.name]["aliases"])


def test_the_linear_evaluation_follows_the_machine_and_the_network_of_the_pretraining():
    pretraining = BarlowTwinsConfig(
        model="resnet18", seed=3, log_dir="x", max_steps=5, resume="never", dry_run=True
    )
    config = linear_config(pretraining, LinearFlags(), run_name="r", backbone="w.safetensors")
    assert (config.model, config.seed, config.log_dir, config.run_name) == ("resnet18", 3, "x", "r")
    assert (config.base_op, config.base_lr, config.lr_schedule) == ("sgd", 0.3, "cosine")
    assert (config.max_steps, config.resume, config.warmup_epochs) == (None, "auto", 0)
    looks = dataclasses.replace(pretraining, dry_run=False, benchmark="data")
    looks = linear_config(looks, LinearFlags(), run_name="r", backbone="")
    assert (looks.benchmark, looks.max_steps) == ("data", 5), "the steps of a benchmark"
    assert (config.effective_batch_size, config.frozen, config.dry_run) == (256, True, True)
    other = dataclasses.replace(pretraining, btlmbda=0.01)
    assert config.pretraining == pretraining.identity != other.identity
    assert dataclasses.replace(pretraining, log_dir="elsewhere").identity == pretraining.identity


def test_a_source_with_one_view_is_refused():
    config = BarlowTwinsConfig(model="small_cnn_bn", no_cuda=True)
    with pytest.raises(UsageError, match="--views 2"):
        build.learner(config, make_plan(config, size=1, train_size=640), Source(), World())
