"""Sums of loss and hits, against recorded numbers and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from conftest import golden
from lars.metrics import Sums, means


def test_accuracy_is_the_recorded_one():
    recorded = golden("losses.json")
    logits = torch.tensor(recorded["nus_LabelSmoothLoss"]["logits"])
    labels = torch.tensor(recorded["nus_LabelSmoothLoss"]["target"])
    sums = Sums("cpu")
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):  # uneven batches weigh by their samples
        sums.add(
            cross_entropy(logits[part], labels[part], reduction="sum"), logits[part], labels[part]
        )
    result = means(sums.totals)
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
    theirs = float(smoothing) * classes / (classes - 1)
    loss = cross_entropy(logits, torch.tensor(recorded["target"]), label_smoothing=theirs)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-10)
    assert torch.allclose(
        logits.grad, torch.tensor(case["grad"], dtype=torch.float64), rtol=1e-10, atol=0
    )


def test_fewer_than_five_classes_and_no_samples():
    sums = Sums("cpu")
    assert all(math.isnan(value) for value in means(sums.totals).values())
    sums.add(torch.tensor(1.0), torch.eye(3), torch.tensor([0, 1, 1]))
    assert means(sums.totals) == {"loss": 1 / 3, "top1": 200 / 3, "top5": 100.0}


def test_sums_go_on_from_a_start_without_changing_it():
    start = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    Sums("cpu", start).add(torch.tensor(1.0), torch.eye(3), torch.tensor([0, 1, 2]))
    assert start.tolist() == [1.0, 2.0, 3.0, 4.0]
