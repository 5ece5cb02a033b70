"""Run on 2 ranks. Takes three steps of four micro-batches and prints the names of the root's collectives."""

import horovod.torch as hvd
import torch
from torch import nn

from lars.comm import start
from lars.comm.gradients import make_gradients
from lars.learner.classification import Classification
from lars.learner.learner import Learner
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

world = start.join()
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
optimizer = create_optimizer("sgd", model, lr=0.1)
gradients = make_gradients(model.parameters(), world)
learner = Learner(model, optimizer, gradients, Classification(), lr_at=lambda step: 0.1)
called.clear()
for step in range(3):
    batches = [(torch.randn(2, 4), torch.tensor([0, 1])) for _ in range(4)]
    learner.step(batches, step, count=4, samples=16)
if world.is_root:
    print(*called)
