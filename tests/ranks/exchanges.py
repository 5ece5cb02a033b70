"""Run on 2 ranks. Takes three steps of four micro-batches and prints the root's collectives.

Argument: the engine, horovod or torch.
"""

import sys

import torch
from torch import nn

from lars.comm import start
from lars.comm.gradients import make_gradients
from lars.learner.classification import Classification
from lars.learner.learner import Learner
from lars.optim import create_optimizer

if sys.argv[1] == "horovod":
    import horovod.torch as library

    NAMES = [
        "allreduce",
        "allreduce_",
        "allreduce_async_",
        "allgather",
        "broadcast_",
        "broadcast_async_",
    ]
else:
    import torch.distributed as library

    NAMES = [
        name for name in dir(library) if name.startswith(("all_", "broadcast", "reduce", "gather"))
    ]
    NAMES += ["barrier", "send", "recv", "isend", "irecv", "scatter"]

called = []


def counted(function, original):
    def call(*args, **kwargs):
        called.append(":".join([function, kwargs["name"]] if "name" in kwargs else [function]))
        return original(*args, **kwargs)

    return call


for function in NAMES:
    setattr(library, function, counted(function, getattr(library, function)))

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
    print("EXCHANGES", *called)
