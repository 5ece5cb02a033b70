"""Compiled CPU kernels for the update rules of `lars.optim.steps`."""
