"""--dry-run: the checks and the plan of a run, without a training step and without writing a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from lars.comm.world import World
from lars.config.config import Config
from lars.errors import UsageError
from lars.job.job import Job
from lars.learner import build
from lars.observe.advice import warnings
from lars.observe.observer import Training
from lars.observe.summary import summary
from lars.run.disk import refuse_unwritable
from lars.run.folder import Run
from lars.run.lock import holder


class PlannedWorld(World):
    """The root of ranks that do not exist. Every collective returns its input."""

    def __init__(self, size: int) -> None:
        """Plan for `size` ranks."""
        self.size = size


def run(config: Config, source: Any, job: Job, workers: int) -> None:
    """Check everything that a real run checks before its first step, and print the plan.

    Raises:
        UsageError: --plan-ranks was given to a job with several ranks, or a real run would refuse the flags.
        CheckpointError: The run folder cannot be used.
    """
    job.interrupt.release()  # there is nothing to save, so a signal should end the process at once
    run = Run(config, source, _world(config, job.world))
    refuse_unwritable(run.folder)
    loaded = run.find_checkpoint()
    learner = build.learner(config, run.plan, source, run.world, run.initialise)
    progress = run.progress_of(loaded, learner)
    training = Training(config, source, run, learner, progress, loaded, workers)
    job.heartbeat("reading the first images")
    seconds = read_first_batches(training, job.world)
    if not job.world.is_root:
        return
    print(summary(training, plot=True))
    for warning in (*warnings(training), *_about_another_job(run)):
        print(f"warning: {warning}")
    print(
        f"the first batches were read in {seconds:.1f} s; dry run: nothing was trained or written"
    )


def _world(config: Config, world: World) -> World:
    """The ranks to plan for."""
    if config.plan_ranks is None:
        return world
    if world.size > 1:
        raise UsageError(
            f"--plan-ranks {config.plan_ranks} is for one process, but this job has {world.size} ranks; leave it out, "
            "or start the script without a launcher"
        )
    return PlannedWorld(config.plan_ranks)


def read_first_batches(training: Training, world: World) -> float:
    """Read this rank's next batch of the training set and its first one of the validation set.

    Returns:
        The time in seconds of the slowest rank.

    Raises:
        DataError: An image cannot be read.
    """
    source, run = training.source, training.run
    began = time.perf_counter()
    share = run.plan.share(world.rank, training.config)
    train_loader = source.train_loader(share, training.workers)
    val_loader = source.val_loader(share, training.workers)
    try:
        next(train_loader.batches_from(training.progress.step))
        next(iter(val_loader), None)
    finally:
        train_loader.close()
        val_loader.close()
    return max(world.all_gather_object(time.perf_counter() - began, "first batches"))


def _about_another_job(run: Run) -> Iterator[str]:
    owner = holder(run.folder)
    if owner is not None:
        yield (
            f"--run-name: {run.folder} is in use by {owner} now; a run would wait for that job, and then be refused"
        )
