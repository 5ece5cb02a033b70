"""Run on 2 ranks. Exchanges gradients in half precision and prints the largest relative error of each exchange.

Arguments: the type of the numbers that are sent, and sizes of the gradients of each rank's mean loss.
"""

import sys

import torch
from torch import nn

from lars.comm import start
from lars.comm.gradients import make_gradients

world = start.join()
torch.manual_seed(0)
factors = 1 + torch.rand(64, 64)
for number, size in enumerate(map(float, sys.argv[2:])):
    layer = nn.Linear(64, 64, bias=False)
    gradients = make_gradients(layer.parameters(), world, reduce_dtype=getattr(torch, sys.argv[1]))
    errors = []
    for growth in (1, 1, 1e4, 1e4):
        gradients.zero()
        gradients.begin_exchange()
        exact = size * growth * factors
        # Each rank's share of the mean over all samples is half of its own mean gradient.
        (layer.weight * exact / world.size).sum().backward()
        gradients.notices[1] = world.rank
        gradients.finish_exchange()
        errors.append(((layer.weight.grad - exact) / exact).abs().max().item())
        assert gradients.notices[1] > 0
    if world.is_root:
        print("ERRORS", sys.argv[1], number, *errors)
