"""Large-batch training: the LARS family of optimizers, their schedules, and a Horovod training engine.

Names are loaded when they are first used, so that ``import lars`` costs nothing and never needs more than torch.
"""
