"""The whole story of a training job: how it starts, takes its steps, saves, validates and ends."""

from __future__ import annotations

from typing import Any

from lars import benchmark, dry_run, evaluation, launcher, models
from lars.config.config import Config
from lars.evaluation import evaluate
from lars.job.interrupt import Interrupt
from lars.job.job import Job, job_of
from lars.learner import build, imported
from lars.learner.device import on_cpu, worker_count
from lars.observe import Observers, StepResult, Training, observers_of, sees_step
from lars.observe.own import observers_at
from lars.run import initial
from lars.run.agreement import check_ranks_agree, check_weights_agree
from lars.run.folder import Run
from lars.run.policy import CheckpointPolicy


def train(config: Config, source: Any, interrupt: Interrupt | None = None) -> None:
    """Train a network from the first step, or from where an earlier run of the same command stopped.

    An error on any rank ends the job on all ranks, with one message and one exit code.

    Args:
        config: The user's flags.
        source: The source of the images. data/__init__.py documents its contract.
        interrupt: Handles the stop signals, if the script created it before it loaded torch.
    """
    with job_of(config, interrupt) as job:
        workers = worker_count(config)
        imported.check_optimizer(config)
        models.builder(config.model)  # reports a wrong --model
        if launcher.rank() == 0:
            observers_at(config.observer)  # reports a wrong --observer before time is spent
        if config.evaluate:
            source = evaluation.validation_only(config, source)
        if config.benchmark != "noise":
            source.check()
            source.start_workers(workers)  # before joining: MPI does not survive a fork
        if launcher.rank() == 0:
            initial.check(config)  # it may download a file, so it comes after the other checks
        world = job.join(on_cpu=on_cpu(config.no_cuda))
        check_ranks_agree(world, config, source)
        for wanted, mode in (
            (config.dry_run, dry_run),
            (config.benchmark, benchmark),
            (config.evaluate, evaluation),
        ):
            if wanted:
                mode.run(config, source, job, workers)
                return
        run = Run(config, source, world)
        with run.locked(while_waiting=job.wait_for_folder):
            fit(config, source, run, job, workers)


def fit(config: Config, source: Any, run: Run, job: Job, workers: int) -> None:
    """Take every remaining step: load, step, measure, save, validate.

    Raises:
        Preempted: The job was asked to stop and has saved a checkpoint.
    """
    world, loaded = job.world, run.find_checkpoint()
    plan = run.plan
    learner = build.learner(config, plan, source, world, run.initialise)
    progress = run.restore(loaded, learner)
    train_loader = source.train_loader(plan.share(world.rank, config), workers)
    val_loader = source.val_loader(plan.share(world.rank, config), workers)
    training = Training(config, source, run, learner, progress, loaded, workers, lambda: job.phase)
    observers = observers_of(training)
    last_step = plan.last_step(config.max_steps)
    saving = CheckpointPolicy(config, last_step)

    observers.start()
    if run.lacks_validation(progress):
        validate(training, val_loader, job)
        observers.validated()
    batches = learner.prepared(train_loader.batches_from(progress.step))
    job.interrupt.wait_for_step()
    for step in range(progress.step, last_step):
        job.heartbeat(f"step {step + 1}")
        due = plan.reads_metrics(step + 1) or saving.is_planned(step + 1)
        for result in learner.launch(
            batches, step, count=plan.micro_batches_in(step), samples=plan.samples_in(step),
            stop=job.stop_requested, save=world.is_root and saving.time_is_up(),
            settle=due or sees_step(config, step + 1),
        ):  # fmt: skip
            record(training, observers, result)
        if progress.step == step:
            continue  # the next step brings the result of this one
        ends_epoch = plan.ends_epoch(progress.step)
        if ends_epoch:
            learner.average_statistics(world)
            check_weights_agree(world, learner.model)
            progress.end_epoch(plan, learner.lr_at(step), learner.task.scales)
        if saving.is_due(result, progress.step, ends_epoch=ends_epoch):
            job.heartbeat("writing a checkpoint")
            run.collect_bad_images(progress, train_loader, val_loader)
            run.save(learner, progress, last=result.stop or progress.step == last_step)
            saving.saved()
            observers.saved()
        if result.stop:
            world.barrier("saved")  # no rank ends before the root has saved
            raise job.preempted(f"saved after step {progress.step} of {plan.total_steps}")
        if run.lacks_validation(progress):
            validate(training, val_loader, job)
            observers.validated()
    job.close()
    train_loader.close()
    val_loader.close()
    if not plan.ends_epoch(progress.step):
        learner.average_statistics(world)
    run.export(learner, progress)
    observers.end()


def record(training: Training, observers: Observers, result: StepResult) -> None:
    """Count a step, read the metrics if it is their turn, and report the step."""
    progress, learner, run = training.progress, training.learner, training.run
    progress.advance(result)
    if run.plan.reads_metrics(progress.step):
        totals, memory = learner.metrics.take(run.world), learner.peak_memory()
        progress.read(totals, learner.task.scales, learner.lr_at(progress.step - 1), memory)
    observers.step(result)
    progress.refuse_divergence(result, training.config.max_skipped_steps)


def validate(training: Training, loader: Any, job: Job) -> None:
    """Validate every network and add the results to the progress. The epoch has already been saved."""
    progress, learner = training.progress, training.learner
    # Wait until the root has saved. If it could not, a stop has to wait for the next step.
    if job.world.broadcast_object(training.run.failed_writes == 0, "saved"):
        job.interrupt.end_at_once(f"step {progress.step} is saved")
    with learner.evaluating():
        measured = {
            split: evaluate(learner, model, loader, training.source.val_size, job)
            for split, model in learner.networks().items()
        }
    job.interrupt.wait_for_step()
    for split, (totals, seconds) in measured.items():
        lr, scales = progress.history[-1]["lr"], learner.task.scales
        progress.add_row(split, totals, seconds, training.run.plan, lr, scales)
    training.run.validated(learner, progress, loader)
