"""Run on 2 ranks: exchanges gradients in half precision; prints the largest relative error of each exchange.

Argument: the size of the gradients of each rank's mean loss.
"""

import sys

import torch
from torch import nn

from lars import comm

size = float(sys.argv[1])
world = comm.start()
layer = nn.Linear(64, 64, bias=False)
gradients = world.gradients(layer.parameters(), fp16=True)
torch.manual_seed(0)
exact = size * (1 + torch.rand(64, 64))
errors = []
for _ in range(4):
    gradients.zero()
    gradients.begin_exchange()
    # Each rank's share of the mean over all samples is half of its own mean gradient.
    (layer.weight * exact / world.size).sum().backward()
    gradients.notices[1] = world.rank
    gradients.finish_exchange()
    errors.append(((layer.weight.grad - exact) / exact).abs().max().item())
    assert gradients.notices[1] > 0
if world.is_root:
    print("ERRORS", *errors)
