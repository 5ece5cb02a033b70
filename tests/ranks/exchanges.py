"""Run on 2 ranks: three steps of four micro-batches; prints the names of all collectives, as the root calls them."""

import horovod.torch as hvd
import torch
from torch import nn

from lars import comm
from lars.learner import Learner
from lars.metrics import Sums
from lars.optim import create_optimizer

called = []


def counted(original):
    def call(*args, **kwargs):
        called.append(kwargs.get("name"))
        return original(*args, **kwargs)

    return call


for name in (
    "allreduce",
    "allreduce_",
    "allreduce_async_",
    "allgather",
    "broadcast_",
    "broadcast_async_",
):
    setattr(hvd, name, counted(getattr(hvd, name)))

world = comm.start()
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
optimizer = create_optimizer("sgd", model, lr=0.1)
learner = Learner(model, optimizer, world.gradients(model.parameters()), lr_at=lambda step: 0.1)
sums = Sums("cpu")
called.clear()
for step in range(3):
    batches = [(torch.randn(2, 4), torch.tensor([0, 1])) for _ in range(4)]
    learner.step(batches, step=step, count=4, samples=16, sums=sums)
if world.is_root:
    print(*called)
