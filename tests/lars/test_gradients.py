"""The exchange of gradients in buckets: their size, the order in which they are sent, and the wait for the sums."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lars.comm.gradients import ExchangedGradients
from lars.comm.world import World


class Twice(World):
    """Two ranks with equal values. The sum appears in the tensor only when it is waited for.

    Attributes:
        started: Names of the sums that were started, in order.
        running: Those that were not waited for yet.
    """

    size = 2
    cpu_bucket_bytes = 4 * 4 * 8  # one layer of 4 x 8 values in float32

    def __init__(self) -> None:
        self.started: list[str] = []
        self.running: list[str] = []

    def start_sum(self, tensor, name):
        self.started.append(name)
        self.running.append(name)
        return tensor, name

    def finish(self, handle):
        tensor, name = handle
        self.running.remove(name)
        tensor.mul_(2)


LAYERS = 3


@pytest.fixture
def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(8, 4, bias=False) for _ in range(LAYERS))


def exchange(gradients: ExchangedGradients, loss: torch.Tensor) -> None:
    gradients.zero()
    gradients.begin_exchange()
    loss.backward()


def test_a_bucket_is_sent_during_the_backward_pass_and_then_waited_for(layers):
    world = Twice()
    gradients = ExchangedGradients(layers.parameters(), world)
    assert [bucket.flat.numel() for bucket in gradients.buckets] == [32, 32, 32 + gradients.NOTICES]
    for _ in range(2):
        world.started.clear()
        exchange(gradients, sum(layer(torch.ones(8)).sum() for layer in layers))
        assert world.started == ["gradients.0", "gradients.1"], "the last one carries the notices"
        gradients.notices[1] = 3.0
        gradients.finish_exchange()
        assert world.started == [f"gradients.{i}" for i in range(LAYERS)]
        assert world.running == []
        assert gradients.notices.tolist() == [0, 6, 0, 0]
        for layer in layers:
            assert torch.equal(layer.weight.grad, torch.full((4, 8), 2.0))


@pytest.mark.parametrize("used", [(0, 1), (0, 2), (1, 2), ()])
def test_every_rank_sends_the_buckets_in_the_same_order(layers, used):
    """The ranks may use different layers. torch.distributed pairs the sums by their order."""
    world = Twice()
    gradients = ExchangedGradients(layers.parameters(), world)
    loss = sum((layers[i](torch.ones(8)).sum() for i in used), torch.zeros(1, requires_grad=True))
    exchange(gradients, loss)
    gradients.finish_exchange()
    assert world.started == [f"gradients.{i}" for i in range(LAYERS)]
    for number, layer in enumerate(layers):
        assert torch.equal(layer.weight.grad, torch.full((4, 8), 2.0 * (number in used)))


def test_micro_batches_before_the_last_one_send_nothing(layers):
    world = Twice()
    gradients = ExchangedGradients(layers.parameters(), world)
    gradients.zero()
    for _ in range(2):
        assert world.started == []
        layers[2](torch.ones(8)).sum().backward()
    gradients.begin_exchange()
    layers[2](torch.ones(8)).sum().backward()
    gradients.finish_exchange()
    assert torch.equal(layers[2].weight.grad, torch.full((4, 8), 6.0))


def test_buckets_hold_one_type_and_a_large_parameter_has_its_own(layers):
    world = Twice()
    world.cpu_bucket_bytes = 300
    mixed = [*layers.parameters(), nn.Parameter(torch.zeros(4, dtype=torch.float64))]
    mixed.append(nn.Parameter(torch.zeros(1000)))
    gradients = ExchangedGradients(mixed, world)
    held = [[view.numel() for _, view in bucket.views] for bucket in gradients.buckets]
    assert held == [[1000], [4], [32, 32], [32]]
    assert [bucket.flat.dtype for bucket in gradients.buckets][1] is torch.float64


def test_the_scales_of_float16_do_not_apply_to_other_types(layers):
    """A branch may change --fp16-allreduce to --bf16-allreduce."""
    half, brain, again = (
        ExchangedGradients(layers.parameters(), Twice(), reduce_dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float16)
    )
    for bucket in half.buckets[:-1]:
        bucket.scale = 1024.0
    own = brain.state_dict()
    brain.load_state_dict(half.state_dict())
    assert brain.state_dict() == own
    again.load_state_dict(half.state_dict())
    assert again.state_dict() == half.state_dict()
