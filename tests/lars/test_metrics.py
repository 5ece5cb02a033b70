"""Sums of losses and hits, compared with recorded numbers and with numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from conftest import golden
from lars.comm.world import World
from lars.learner.classification import Classification
from lars.learner.metrics import Metrics, count, means

TASK = Classification()


def add(metrics: Metrics, logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Add a batch with these logits."""
    _, sums = TASK.loss_and_sums(lambda images: images, (logits, labels))
    metrics.add(sums, len(labels))


def test_accuracy_equals_the_recorded_values():
    recorded = golden("losses.json")
    logits = torch.tensor(recorded["nus_LabelSmoothLoss"]["logits"])
    labels = torch.tensor(recorded["nus_LabelSmoothLoss"]["target"])
    metrics = Metrics(TASK.scales, "cpu")
    for part in (
        slice(0, 1),
        slice(1, 4),
        slice(4, 6),
    ):  # every sample of uneven batches weighs the same
        add(metrics, logits[part], labels[part])
    result = means(TASK.scales, metrics.totals)
    top1, _, top5 = recorded["tvlars_accuracy"]["percent"]
    assert result["top1"] == pytest.approx(top1, rel=1e-6)
    assert result["top5"] == pytest.approx(top5, rel=1e-6)
    assert result["loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-6)


@pytest.mark.parametrize("smoothing", ["0.0", "0.1", "0.3"])
def test_label_smoothing_maps_to_the_published_loss(smoothing):
    recorded = golden("losses.json")["nus_LabelSmoothLoss"]
    case = recorded["smoothing"][smoothing]
    logits = torch.tensor(recorded["logits"], dtype=torch.float64, requires_grad=True)
    classes = logits.shape[1]
    task = Classification(label_smoothing=float(smoothing) * classes / (classes - 1))
    targets = torch.tensor(recorded["target"])
    loss = task.loss_and_sums(lambda images: images, (logits, targets))[0] / len(targets)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-10)
    assert torch.allclose(
        logits.grad, torch.tensor(case["grad"], dtype=torch.float64), rtol=1e-10, atol=0
    )


def test_fewer_than_five_classes_and_no_samples():
    metrics = Metrics(TASK.scales, "cpu")
    assert all(math.isnan(value) for value in means(TASK.scales, metrics.totals).values())
    add(metrics, torch.eye(3), torch.tensor([0, 1, 1]))
    result = means(TASK.scales, metrics.totals)
    assert (result["top1"], result["top5"]) == (200 / 3, 100.0)
    assert count(metrics.totals) == 3


def test_taking_the_totals_resets_them():
    metrics = Metrics(TASK.scales, "cpu")
    add(metrics, torch.eye(3), torch.tensor([0, 1, 2]))
    taken = metrics.take(World())
    assert taken.tolist()[1:] == [3.0, 3.0, 3.0]
    assert metrics.totals.tolist() == [0.0] * 4


def test_a_new_metric_needs_only_a_name_and_a_sum():
    """A task gets one more metric, and no other code changes."""

    class WithEntropy(Classification):
        scales = Classification.scales | {"entropy": 1.0}

        def loss_and_sums(self, model, batch):
            loss, sums = super().loss_and_sums(model, batch)
            p = model(batch[0]).softmax(1)
            return loss, sums | {"entropy": -(p * p.log()).sum()}

    task = WithEntropy()
    metrics = Metrics(task.scales, "cpu")
    _, sums = task.loss_and_sums(lambda images: images, (torch.zeros(2, 4), torch.tensor([0, 1])))
    metrics.add(sums, 2)
    assert means(task.scales, metrics.totals)["entropy"] == pytest.approx(math.log(4))


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_have_the_layout_that_was_asked_for(channels_last):
    images = torch.zeros(2, 3, 4, 5, dtype=torch.uint8).to(memory_format=torch.channels_last)
    task = Classification(channels_last=channels_last)
    prepared, _ = task.prepare((images, torch.zeros(2, dtype=torch.int64)), torch.device("cpu"))
    assert prepared.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert prepared.is_contiguous() != channels_last
