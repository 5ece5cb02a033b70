"""Batches that a network cannot learn from are refused before training, and no others are."""

from __future__ import annotations

import itertools
import types

import pytest
import torch
from torch import nn

from lars.config import Config, UsageError
from lars.config.plan import make_plan
from lars.learner.build import build_model
from lars.learner.trial import fewest_batch_norm_samples, refuse_impossible_batches


def images(side: int, policy: str = "error"):
    return types.SimpleNamespace(image_size=side, on_bad_image=policy)


def refuse(config: Config, source, *, size: int = 1, samples: int = 320) -> None:
    plan = make_plan(config, size=size, train_size=samples)
    refuse_impossible_batches(build_model(config, 2), config, plan, source)


@pytest.mark.parametrize(
    ("more", "size", "samples"),
    [({}, 1, 97), ({"sync_bn": True}, 2, 97), ({"batch_size": 1}, 1, 8)],
)
def test_a_batch_without_batch_norm_statistics_is_refused(more, size, samples):
    config = Config(**{"model": "shufflenet_v2_x0_5", "batch_size": 8} | more)
    with pytest.raises(
        UsageError, match=r"--batch-size .* no BatchNorm statistics over a single image of 32 px"
    ):
        refuse(config, images(32), size=size, samples=samples)
    refuse(config, images(64), size=size, samples=samples)


def test_synchronised_statistics_count_the_micro_batches_of_all_ranks():
    """105 samples leave one sample for the last micro-batch, but nine for both ranks together."""
    config = Config(model="shufflenet_v2_x0_5", batch_size=8, sync_bn=True)
    refuse(config, images(32), size=2, samples=105)


def test_skipping_images_may_leave_one_in_a_batch():
    config = Config(model="shufflenet_v2_x0_5", batch_size=8)
    with pytest.raises(UsageError, match=r"--on-bad-image skip .* use --on-bad-image replace"):
        refuse(config, images(32, "skip"))
    refuse(config, images(64, "skip"))


@pytest.mark.parametrize(("model", "side"), [("vit_b_16", 32), ("alexnet", 32), ("vgg11", 16)])
def test_a_network_that_does_not_fit_the_image_size_is_refused(model, side):
    with pytest.raises(UsageError, match=f"--image-size {side}: {model} cannot process"):
        refuse(Config(model=model), images(side))


def test_every_size_of_a_schedule_is_tried():
    model, source = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)), images(8)
    source.train_sizes = ((1, 8), (5, 6))
    plan = make_plan(Config(), size=1, train_size=320)
    with pytest.raises(UsageError, match="--image-size-schedule 6: resnet50 cannot process"):
        refuse_impossible_batches(model, Config(), plan, source)
    source = images(64)
    source.train_sizes = ((1, 64), (5, 32), (9, 64))
    config = Config(model="shufflenet_v2_x0_5", batch_size=8)
    with pytest.raises(UsageError, match="no BatchNorm statistics over a single image of 32 px"):
        refuse(config, source, samples=97)
    refuse(config, source, samples=98)


def test_a_network_that_needs_values_for_a_trial_is_accepted():
    refuse(Config(model="regnet_y_400mf"), images(64))


def test_a_trial_changes_nothing():
    config = Config(model="resnet18")
    model, untouched = build_model(config, 2), build_model(config, 2)
    plan = make_plan(config, size=1, train_size=320)
    state = torch.random.get_rng_state()
    refuse_impossible_batches(model, config, plan, images(32))
    assert torch.equal(torch.random.get_rng_state(), state)
    for one, other in zip(
        model.state_dict().values(), untouched.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)


class OnePixel(nn.Module):
    """BatchNorm over a feature map of one pixel, which needs two samples."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x.mean((2, 3), keepdim=True))


def test_exactly_the_runs_that_would_fail_are_refused():
    """For every small epoch, compute the sizes of the micro-batches and run the network on each."""
    model = OnePixel()
    refused = 0
    for batch, accumulation, samples in itertools.product(range(2, 7), (1, 2, 5), range(2, 45)):
        config = Config(batch_size=batch, batches_per_allreduce=accumulation)
        plan = make_plan(config, size=1, train_size=samples)
        last = plan.samples_in(plan.steps_per_epoch - 1)
        parts = -(-last // batch)
        sizes = [(i + 1) * last // parts - i * last // parts for i in range(parts)]
        fewest = fewest_batch_norm_samples(config, plan, images(8))
        assert fewest == min(*sizes, batch)
        try:
            refuse_impossible_batches(model, config, plan, images(8))
        except UsageError:
            refused += 1
            with pytest.raises(ValueError, match="Expected more than 1 value"):
                model(torch.zeros(min(sizes), 3, 8, 8))
        else:
            for size in sizes:
                model(torch.zeros(size, 3, 8, 8))
    assert refused > 20
