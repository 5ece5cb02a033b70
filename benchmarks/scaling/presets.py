"""Known GPUs and networks. All values are published or assumed, and none was measured by this project.

The speed of a GPU is that of a published run on one host with 8 GPUs (MLPerf training logs: NVIDIA's MXNet with fused
kernels, which eager PyTorch does not reach). `a100-pytorch` is the PyTorch figure of NVIDIA's DeepLearningExamples.
"""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

from benchmarks.scaling.machine import Machine
from benchmarks.scaling.model import Link

FOLDER = Path(__file__).parent

# A training step of ResNet-50 starts about 285 kernels if they are fused: 53 convolutions with 3 each (forward, data,
# weights), 53 BatchNorms with 2, and about 20 others. A kernel takes at least about 4 us on a GPU, however small it is.
FIXED_STEP = 285 * 4e-6
# A forward pass takes about a third of forward and backward, because a backward pass computes two gradients.
FORWARD_SHARE = 1 / 3
# SGD with momentum and LARS move 7 numbers of 4 bytes per parameter.
UPDATE_BYTES = 7 * 4 * 25_557_032
# Assumed standard deviation of a step's computation.
SPREAD = 0.01
# Assumed time of a validation besides its forward passes, of a checkpoint, and until the first step.
VALIDATION_FIXED, CHECKPOINT, START = 0.2, 1.0, 30.0


class Gpu(NamedTuple):
    """A kind of GPU in a host with 8 of them.

    Attributes:
        rate: Images/s of one GPU in a published run on one host.
        batch: Images per GPU of that run.
        memory: Bytes per second of its memory.
        nvlink: Bytes per second that it sends to the others of its host.
        largest_batch: Images of a micro-batch.
        sent: Share of the bytes of 4-byte gradients that are sent.
        source: Where the rate comes from.
    """

    rate: float
    batch: int
    memory: float
    nvlink: float
    largest_batch: int
    sent: float
    source: str


# The achievable bandwidth of NVLink is assumed to be 0.8 of its nominal value.
GPUS = {
    "v100": Gpu(1384, 208, 0.9e12, 0.8 * 150e9, 208, 0.5, "MLPerf v0.7, 8 V100, batch 1,664"),
    "a100": Gpu(3396, 408, 1.6e12, 0.8 * 300e9, 408, 0.5, "MLPerf v2.1, 8 A100, batch 3,264"),
    "a100-pytorch": Gpu(
        2470, 256, 1.6e12, 0.8 * 300e9, 408, 1.0, "DeepLearningExamples, 1 A100, AMP"
    ),
    "h100": Gpu(7157, 400, 3.35e12, 0.8 * 450e9, 408, 0.5, "MLPerf v4.0, 8 H100, batch 3,200"),
    "h200": Gpu(7945, 400, 4.8e12, 0.8 * 450e9, 816, 0.5, "MLPerf v4.0, 8 H200, batch 3,200"),
}

_INFINIBAND, _ETHERNET = 5e-6, 30e-6  # time of a message, assumed

# Between hosts: the nominal bandwidth of all adapters of a host, of which 0.9 is assumed to be achievable.
NETWORKS = {
    "ib-ndr-8": Link(_INFINIBAND, 0.9 * 400e9, launch=10e-6),  # 8 x 400 Gbit/s, as in DGX H100
    "ib-hdr-8": Link(_INFINIBAND, 0.9 * 200e9, launch=10e-6),  # 8 x 200 Gbit/s, as in DGX A100
    "ib-edr-4": Link(_INFINIBAND, 0.9 * 50e9, launch=10e-6),  # 4 x 100 Gbit/s, as in DGX-1
    "ib-hdr": Link(_INFINIBAND, 0.9 * 25e9, launch=10e-6),
    "ethernet-100g": Link(_ETHERNET, 0.9 * 12.5e9, launch=10e-6),
    "ethernet-25g": Link(_ETHERNET, 0.9 * 3.125e9, launch=10e-6),
    "ethernet-10g": Link(_ETHERNET, 0.9 * 1.25e9, launch=10e-6),
}


def resnet50() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Bytes of the gradients of ResNet-50's blocks in the order of the backward pass, and when each is complete.

    The time of a block is assumed to be proportional to its multiplications at 224 px. The file has one row per block.
    """
    with (FOLDER / "resnet50.csv").open() as file:
        rows = [(int(r["parameters"]), int(r["multiply_adds"])) for r in csv.DictReader(file)]
    total, done, ready = sum(work for _, work in rows), 0, []
    for _, work in rows:
        done += work
        ready.append(done / total)
    return tuple(4.0 * count for count, _ in rows), tuple(ready)


def compute_points(
    fixed: float, per_image: float, batch: int
) -> tuple[tuple[tuple[float, float], ...], tuple[tuple[float, float], ...]]:
    """The points of a forward and of a backward pass that take `fixed` + images * `per_image` together."""
    ends = [(images, fixed + images * per_image) for images in (0, batch)]
    forward = tuple((images, FORWARD_SHARE * seconds) for images, seconds in ends)
    backward = tuple((images, (1 - FORWARD_SHARE) * seconds) for images, seconds in ends)
    return forward, backward


def machine(gpu: str, network: Link) -> Machine:
    """The parameters of a host with GPUs of one kind. Its speed on 8 GPUs is the published one."""
    from benchmarks.scaling.predict import Job, predict

    row = GPUS[gpu]
    gradients, ready = resnet50()
    distribution = NormalDist(1.0, SPREAD)
    spread = tuple(distribution.inv_cdf((place + 0.5) / 1000) for place in range(1000))
    made = Machine(
        gpu, (), (), UPDATE_BYTES / row.memory, gradients, ready,
        inside=Link(2e-6, row.nvlink, launch=10e-6), network=network, spread=spread,
        largest_batch=row.largest_batch, sent=row.sent,
        checkpoint=CHECKPOINT, validation_fixed=VALIDATION_FIXED, start=START, about=row.source,
    )  # fmt: skip
    ranks = 1 if gpu.endswith("-pytorch") else 8
    wanted = row.batch / row.rate
    per_image = (wanted - FIXED_STEP) / row.batch
    for _ in range(3):  # the exchange and the slowest rank also take time
        forward, backward = compute_points(FIXED_STEP, per_image, row.batch)
        made = made.replace(forward=forward, backward=backward)
        per_image += (wanted - predict(made, Job(1, ranks, ranks * row.batch)).step) / row.batch
    return made
