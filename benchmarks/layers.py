"""Measures what the readings of every layer (--layers-every) cost.

    python -m benchmarks.layers                                       # ResNet-50, 64 px, LARS, a CPU
    python -m benchmarks.layers --optimizer lamb --batch-size 64 --image-size 96

One process alternates steps with and without a reading, so that a slow moment of the machine affects both. On a CPU,
the times are CPU times of this process, which other programs hardly disturb. A reading
includes its copy of the weights, its norms, its copy to the host, and what it writes to disk. The last column divides
the difference of the medians by the number of steps between two readings.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import types
from pathlib import Path

import torch

from lars import models
from lars.comm.gradients import make_gradients
from lars.comm.world import World
from lars.config import Config
from lars.learner.classification import Classification
from lars.learner.learner import Learner, StepResult
from lars.names import OPTIMIZERS
from lars.observe import Layers, Training
from lars.optim import create_optimizer
from lars.run.progress import Progress

TAKEN = StepResult(taken=True, stop=False, save=False)


def training_in(folder: Path, options: argparse.Namespace) -> Training:
    """A training without data, whose Layers observer reads every second step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.build(options.model, 1000).to(device, memory_format=torch.channels_last)
    optimizer = create_optimizer(options.optimizer, model, lr=1e-3, weight_decay=1e-4)
    gradients = make_gradients(model.parameters(), World())
    task = Classification()
    learner = Learner(model, optimizer, gradients, task, lr_at=lambda step: 1e-3)
    config = Config(layers_every=2)
    run = types.SimpleNamespace(folder=folder)
    return Training(config, None, run, learner, Progress())


def times_of(training: Training, options: argparse.Namespace) -> dict[bool, list[float]]:
    """Seconds of the steps with (True) and without (False) a reading, after two of each."""
    learner, observer, progress = training.learner, Layers(training), training.progress
    observer.start()
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    batch = (torch.randn(shape), torch.randint(1000, shape[:1]))
    batch = tuple(tensor.to(learner.device) for tensor in batch)
    times: dict[bool, list[float]] = {True: [], False: []}
    on_gpu = learner.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    for step in range(2 * (options.rounds + 2)):
        began = clock()
        learner.step([batch], step, count=1, samples=options.batch_size)
        progress.step += 1
        observer.step(TAKEN)
        if on_gpu:
            torch.cuda.synchronize()
        times[progress.step % 2 == 0].append(clock() - began)
    return {read: seconds[2:] for read, seconds in times.items()}


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50", help="network (default: %(default)s)")
    parser.add_argument("--optimizer", default="lars", choices=OPTIMIZERS)
    parser.add_argument("--batch-size", type=int, default=32, help="samples per step")
    parser.add_argument("--image-size", type=int, default=64, help="pixels per side")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind")
    parser.add_argument("--every", type=int, default=Config.layers_every, help="as --layers-every")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = times_of(training_in(Path(folder), options), options)
    plain, reading = (statistics.median(times[read]) for read in (False, True))
    cost = statistics.median(r - p for r, p in zip(times[True], times[False], strict=True))
    print(
        f"{options.model} {options.optimizer}: step {1e3 * plain:.1f} ms, with a reading {1e3 * reading:.1f} ms, "
        f"median difference {1e3 * cost:.1f} ms = {100 * cost / plain / options.every:.2f} % "
        f"of the time with --layers-every {options.every}"
    )


if __name__ == "__main__":
    main()
