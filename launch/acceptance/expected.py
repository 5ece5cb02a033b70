"""Published speeds of ResNet-50 training at 224 px in 16 bits, in images/s of one GPU."""

from __future__ import annotations

from typing import NamedTuple


class Range(NamedTuple):
    """Speeds below `low` are slow. `high` is the fastest published one."""

    low: float
    high: float


# The slowest published speed of PyTorch on an A100: NVIDIA's DeepLearningExamples, ResNet-50 v1.5, one GPU.
_PYTORCH_ON_A100 = 2470.0
# `high`: one GPU's share of 8 in MLPerf Training (2.1 for the A100, 4.0 for the others), MXNet with fused kernels.
# There is no published speed of PyTorch on an H100 or H200. They should be at least as fast as an A100.
RESNET50 = {
    "A100": Range(_PYTORCH_ON_A100, 3396.0),
    "H100": Range(_PYTORCH_ON_A100, 7157.0),
    "H200": Range(_PYTORCH_ON_A100, 7945.0),
}


def expected(gpu: str) -> Range | None:
    """The range for a GPU by its name, or None if there is no published speed.

    Example:
        >>> expected("NVIDIA H100 80GB HBM3")
        Range(low=2470.0, high=7157.0)
    """
    return next((found for name, found in RESNET50.items() if name in gpu), None)
