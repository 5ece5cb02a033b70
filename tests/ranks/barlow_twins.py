"""Run on any number of ranks. Takes a step of Barlow Twins in float64 and compares it with a single process.

The step has two rounds of micro-batches of unequal sizes, some of them empty. Each rank computes the reference from
all samples with torch's BatchNorm and a plain formula.
"""

import copy
import os

import torch
from torch import nn

from lars.comm import start
from lars.comm.gradients import make_gradients
from lars.learner.barlow_twins import BarlowTwins, BarlowTwinsNet, projector
from lars.learner.learner import Learner
from lars.models.sync_batch_norm import synchronised

LAMBDA, LR = 0.02, 0.5
# Samples of each rank in each round.
SHARES = {2: [(5, 2), (3, 0)], 3: [(1, 4, 2), (2, 0, 0)]}

world = start.join()
torch.manual_seed(0)
backbone = nn.Sequential(
    nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
)
network = BarlowTwinsNet(backbone, projector(6, (8, 5))).double()
reference = copy.deepcopy(network)
rounds = [torch.randn(sum(share), 2, 3, 6, 6).double() for share in SHARES[world.size]]


def reference_loss(views):
    """The loss of one round in a single process, as in the paper."""
    z1, z2 = (reference(view) for view in views.unbind(1))
    c = z1.T @ z2 / len(views)
    on = sum((c[i, i] - 1) ** 2 for i in range(len(c)))
    off = sum(c[i, j] ** 2 for i in range(len(c)) for j in range(len(c)) if i != j)
    return on + LAMBDA * off


samples = sum(map(len, rounds))
losses = [len(views) * reference_loss(views) for views in rounds]
expected = sum(losses) / samples
expected.backward()
torch.optim.SGD(reference.parameters(), lr=LR).step()

synchronised(network, lambda tensor, name: world.all_reduce(tensor, name))
task = BarlowTwins(lmbda=LAMBDA, all_reduce=lambda tensor, name: world.all_reduce(tensor, name))
learner = Learner(
    network,
    torch.optim.SGD(network.parameters(), lr=LR),
    make_gradients(network.parameters(), world),
    task,
    lr_at=lambda step: LR,
    forward_is_collective=True,
)
batches = [
    (views.split(share)[world.rank], torch.zeros(share[world.rank], dtype=torch.int64))
    for views, share in zip(rounds, SHARES[world.size], strict=True)
]
assert learner.step(batches, 0, count=len(batches), samples=samples).taken
totals = learner.metrics.take(world)

worst = abs(totals[0].item() / samples - expected.item())
for (name, mine), theirs in zip(
    network.state_dict().items(), reference.state_dict().values(), strict=True
):
    error = (mine - theirs).abs().max().item()
    worst = max(worst, error)
    assert error < 1e-12, f"rank {world.rank}: {name} differs by {error}"
assert worst < 1e-12, worst
assert totals[-1] == samples
os.write(
    1, f"rank {world.rank}: exact to {worst:.1e}\n".encode()
)  # in one go: lines of two ranks may not mix
