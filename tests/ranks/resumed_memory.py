"""Print the resident memory (MiB) of a new run and of the same run after it was resumed. Argument: a folder."""

import dataclasses
import gc
import sys
from pathlib import Path

import torch

from lars.comm.world import World
from lars.config import Config
from lars.learner import build
from lars.run.folder import Run
from lars.run.progress import Progress


@dataclasses.dataclass(frozen=True)
class Source:
    train_size, val_size, num_classes, image_size, fingerprint = 640, 64, 1000, 64, "a-b"
    mean = std = (1.0, 1.0, 1.0)
    class_names = ()


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024


config = Config(
    model="alexnet", base_op="lars", log_dir=sys.argv[1], run_name="run", batch_size=4, no_cuda=True
)
world = World()
run = Run(config, Source(), world)
run.folder.mkdir()
learner = build.learner(config, run.plan, Source(), world)
batch = (torch.zeros(4, 3, 64, 64, dtype=torch.uint8), torch.arange(4))
learner.step(learner.prepared([batch]), 0, count=1, samples=4)
fresh = resident()
run.save(learner, Progress(step=1), last=True)
again = Run(config, Source(), world)
again.restore(again.find_checkpoint(), learner)
print("MIB", fresh, resident())
