"""What a network cannot learn from is refused before training, and nothing else is."""

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
def test_a_batch_over_which_there_are_no_statistics_is_refused(more, size, samples):
    config = Config(**{"model": "shufflenet_v2_x0_5", "batch_size": 8} | more)
    with pytest.raises(UsageError, match=r"--batch-size .* no BatchNorm statistics at 32 px"):
        refuse(config, images(32), size=size, samples=samples)
    refuse(config, images(64), size=size, samples=samples)


def test_synchronised_statistics_are_over_the_micro_batches_of_all_ranks():
    """105 samples leave one for the last micro-batch, but nine for those of both ranks."""
    config = Config(model="shufflenet_v2_x0_5", batch_size=8, sync_bn=True)
    refuse(config, images(32), size=2, samples=105)


def test_skipped_images_may_leave_one_in_a_batch():
    config = Config(model="shufflenet_v2_x0_5", batch_size=8)
    with pytest.raises(UsageError, match=r"--on-bad-image skip .* use --on-bad-image replace"):
        refuse(config, images(32, "skip"))
    refuse(config, images(64, "skip"))


@pytest.mark.parametrize(("model", "side"), [("vit_b_16", 32), ("alexnet", 32), ("vgg11", 16)])
def test_a_network_that_does_not_fit_the_images_is_refused_by_the_flag(model, side):
    with pytest.raises(UsageError, match=f"--image-size {side}: {model} cannot process"):
        refuse(Config(model=model), images(side))


def test_a_network_that_cannot_be_tried_without_values_is_accepted():
    refuse(Config(model="regnet_y_400mf"), images(64))


def test_trying_changes_nothing():
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
    """BatchNorm over a feature map of one pixel: it needs two samples."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x.mean((2, 3), keepdim=True))


def test_no_run_that_works_is_refused_and_no_other_accepted():
    """Every small epoch: the micro-batches are cut, and the network is really run over each size."""
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
