"""Run on 2 ranks: one meets what is not finite. Argument: gradient, loss or none (nothing is wrong).

Prints whether each step was taken, and whether the weights moved, as each rank sees it.
"""

import sys

import torch
from torch import nn

from lars import comm
from lars.learner import Learner
from lars.metrics import Sums
from lars.optim import create_optimizer

world = comm.start()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
optimizer = create_optimizer("lars", model, lr=0.1)
learner = Learner(model, optimizer, world.gradients(model.parameters()), lr_at=lambda step: 0.1)
for step in range(3):
    images = torch.randn(2, 4)
    if step == 1 and world.rank == 1:
        if sys.argv[1] == "loss":
            images[0, 0] = float("nan")
        if sys.argv[1] == "gradient":
            handle = model[0].weight.register_hook(lambda grad: grad / 0)
    before = [p.clone() for p in model.parameters()]
    buffers = [b["momentum_buffer"].clone() for b in optimizer.state.values()]
    batches = [(images, torch.tensor([0, 1]))]
    notice = learner.step(batches, step=step, count=1, samples=4, sums=Sums("cpu"))
    moved = any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    after = [b["momentum_buffer"] for b in optimizer.state.values()]
    kept = all(torch.equal(b, c) for b, c in zip(after, buffers, strict=False)) and bool(buffers)
    print(f"rank {world.rank} step {step} taken {notice.taken} moved {moved} momentum kept {kept}")
    if not notice.taken:
        print(f"broken in {learner.broken_layer()}")
    if step == 1 and world.rank == 1 and sys.argv[1] == "gradient":
        handle.remove()
