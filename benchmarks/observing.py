"""Steps of two equal trainers, of which only one has the observers of a run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import tempfile
import time
from collections.abc import Callable, Iterator


@dataclasses.dataclass(frozen=True)
class Source:
    """What observers read about images that are already in memory."""

    image_size: int = 128
    train_size: int = 16_000

    val_size, num_classes, fingerprint = 50_000, 1000, "noise"
    class_names, warnings, description = (), (), ""
    mean, std = (127.5,) * 3, (64.0,) * 3


@contextlib.contextmanager
def observed_steps(args: argparse.Namespace) -> Iterator[Callable[[], dict[bool, float]]]:
    """Two equal trainers, of which only one has observers.

    The observers are those of every run. They read the metrics and the layers every 10 steps, more often than by
    default. CPU times are compared, so that other programs do not disturb the figure.

    Yields:
        A function that takes 10 steps of each trainer in turn. It returns the CPU seconds with (True) and without
        (False) observers.
    """
    from lars import benchmark
    from lars.comm.world import World
    from lars.config import Config
    from lars.learner import build
    from lars.observe import StepResult, Training, observers_of
    from lars.run.folder import Run
    from lars.run.progress import Progress

    source = Source(args.image_size, train_size=1000 * args.batch_size)
    batch = benchmark.noise(args.batch_size, args.image_size, 1000)
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            model=args.model, batch_size=args.batch_size, base_op="lars", no_cuda=True, log_dir=folder,
            log_every=10, layers_every=10,
        )  # fmt: skip
        run = Run(config, source, World())
        run.folder.mkdir()
        trainings = {}
        for has_observers in (False, True):
            learner = build.learner(config, run.plan, source, World())
            progress = Progress.starting(learner.metrics.totals)
            trainings[has_observers] = Training(config, source, run, learner, progress)
        observers = observers_of(trainings[True])

        def step(training: Training) -> StepResult:
            learner, progress = training.learner, training.progress
            batches = learner.prepared([batch])
            result = learner.step(batches, progress.step, count=1, samples=args.batch_size)
            progress.advance(result)
            if run.plan.reads_metrics(progress.step):
                progress.read(learner.metrics.take(World()), learner.task.scales, 0.1)
            return result

        def ten_steps() -> dict[bool, float]:
            seconds = {False: 0.0, True: 0.0}
            with contextlib.redirect_stdout(io.StringIO()):
                if trainings[True].progress.step == 0:
                    observers.start()
                for _ in range(config.layers_every):
                    for has_observers, training in trainings.items():
                        start = time.process_time()
                        result = step(training)
                        if has_observers:
                            observers.step(result)
                        seconds[has_observers] += time.process_time() - start
            return seconds

        yield ten_steps
