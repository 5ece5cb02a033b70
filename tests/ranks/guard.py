"""Run on 2 ranks. One rank has a non-finite loss, a non-finite gradient, or neither.

Each rank prints whether each step was taken and whether the weights moved.
"""

import os

import torch
from torch import nn

from lars.comm import start
from lars.comm.gradients import make_gradients
from lars.comm.world import World
from lars.learner.classification import Classification
from lars.learner.learner import Learner
from lars.optim import create_optimizer


def run(world: World, where: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = create_optimizer("lars", model, lr=0.1)
    gradients = make_gradients(model.parameters(), world)
    learner = Learner(model, optimizer, gradients, Classification(), lr_at=lambda step: 0.1)
    for step in range(3):
        images = torch.randn(2, 4)
        nonfinite = step == 1 and world.rank == 1
        if nonfinite and where == "loss":
            images[0, 0] = float("nan")
        if nonfinite and where == "gradient":
            handle = model[0].weight.register_hook(lambda grad: grad / 0)
        before = [p.clone() for p in model.parameters()]
        buffers = [b["momentum_buffer"].clone() for b in optimizer.state.values()]
        batches = [(images, torch.tensor([0, 1]))]
        result = learner.step(batches, step, count=1, samples=4)
        moved = any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        after = [b["momentum_buffer"] for b in optimizer.state.values()]
        kept = bool(buffers) and all(map(torch.equal, after, buffers))
        outcome = f"taken {result.taken} moved {moved} momentum kept {kept}"
        lines = f"{where}: rank {world.rank} step {step} {outcome}\n"
        if not result.taken:
            lines += f"{where}: {result.cause}\n"
        os.write(1, lines.encode())  # in one go: lines of two ranks may not mix
        if nonfinite and where == "gradient":
            handle.remove()


def main() -> None:
    world = start.join()
    for where in ("gradient", "loss", "none"):
        run(world, where)


main()
