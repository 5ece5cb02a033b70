"""Warnings about flags that are valid but probably not what the user intends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lars.config.flags import flag_name
from lars.learner.trial import train_sizes
from lars.run.disk import disk_space, space_warnings
from lars.run.identity import run_name
from lars.run.weights import listed

if TYPE_CHECKING:
    from lars.observe.observer import Training


def warnings(training: Training) -> list[str]:
    """One message for each doubtful setting. It names the flag to change.

    Raises:
        CheckpointError: Not even one checkpoint fits on the disk.
    """
    return [
        *training.source.warnings,
        *_about_the_schedule(training),
        *_about_the_loss(training),
        *_about_the_average(training),
        *_about_the_sizes(training),
        *_about_the_copies(training),
        *_about_the_initial_weights(training),
        *_about_a_shorter_run(training),
        *_about_the_disk(training),
    ]


def _about_the_schedule(training: Training) -> Iterator[str]:
    config, plan = training.config, training.run.plan
    for name in config.ignored_by_the_schedule():
        yield f"{flag_name(name)} has no effect with --lr-schedule {config.lr_schedule}"
    if config.base_op == "tvlars" and plan.warmup_steps:
        yield (
            f"--warmup-epochs {config.warmup_epochs:g} adds a second warm-up to that of tvlars; add --warmup-epochs 0"
        )
    if plan.warmup_steps >= plan.total_steps:
        yield (
            f"--warmup-epochs {config.warmup_epochs:g} takes all of --epochs {config.epochs}, so the learning rate "
            "never decays; lower --warmup-epochs"
        )
    if plan.effective_batch_size > plan.train_size:
        yield (
            f"the effective batch size {plan.effective_batch_size} is larger than the training set of "
            f"{plan.train_size} images, so an epoch is a single short step; lower --effective-batch-size"
        )


def _about_the_loss(training: Training) -> Iterator[str]:
    config = training.config
    if config.loss != "bce":
        return
    threshold, smoothing = config.bce_target_threshold, config.label_smoothing
    if threshold is not None and smoothing:
        yield (
            f"--label-smoothing {smoothing:g} has little effect with --bce-target-threshold {threshold:g}, which makes "
            "every target 0 or 1; add --label-smoothing 0"
        )
    if config.base_op == "sgd" and not config.bce_sum:
        yield (
            f"--loss bce is the mean over {training.source.num_classes} classes, so its gradients are much smaller "
            "than those of --loss ce; with sgd, add --bce-sum, or use a much higher --base-lr"
        )


def _about_the_average(training: Training) -> Iterator[str]:
    config, plan = training.config, training.run.plan
    if config.ema_decay and not config.ema_warmup and plan.total_steps * (1 - config.ema_decay) < 2:
        yield (
            f"--ema-decay {config.ema_decay:g} averages over {1 / (1 - config.ema_decay):.0f} steps, but the run has "
            f"only {plan.total_steps}, so the average lags behind; lower --ema-decay, or leave out --no-ema-warmup"
        )


def _about_the_sizes(training: Training) -> Iterator[str]:
    epochs = training.config.epochs
    for epoch, size in train_sizes(training.source):
        if epoch > epochs:
            yield f"--image-size-schedule: {epoch}:{size} has no effect with --epochs {epochs}"


def _about_the_copies(training: Training) -> Iterator[str]:
    copies = getattr(training.source, "repeated_aug", 1)
    if copies > training.run.plan.effective_batch_size:
        yield (
            f"--repeated-aug {copies} is more than the effective batch size {training.run.plan.effective_batch_size}, "
            "so whole steps see a single image; lower it"
        )


def _about_the_initial_weights(training: Training) -> Iterator[str]:
    config, init = training.config, training.progress.init
    if config.freeze_backbone and not (init or training.loaded):
        yield "--freeze-backbone without --init trains the head of a random network; add --init"
    if training.loaded is not None or not init:
        return
    random = {"zero_init_last_gamma": init["missing"]}
    random["weight_init"] = init["missing"] or init["new_heads"]
    for name, filled in random.items():
        if not filled and getattr(config, name) not in (False, "default"):
            yield f"{flag_name(name)} has no effect with --init {init['from']}, which replaces all of these weights"
    if init["missing"]:
        (text,) = listed("missing", init["missing"])
        yield f"--init {init['from']}: {text} in the file; these tensors keep their random weights"
    if init["unexpected"]:
        (text,) = listed("unexpected", init["unexpected"])
        yield f"--init {init['from']}: {text} in the file; they are not used"


def _about_a_shorter_run(training: Training) -> Iterator[str]:
    """The default name of the run folder contains the number of epochs, so a longer run starts from scratch."""
    config, folder = training.config, training.run.folder
    if training.loaded is not None or config.run_name is not None:
        return
    name = re.escape(run_name(config)).replace(f"_ep{config.epochs}_", r"_ep(\d+)_")
    for other in sorted(folder.parent.glob("*")) if folder.parent.is_dir() else ():
        found = re.fullmatch(name, other.name)
        if found and other != folder and any(other.glob("checkpoint-*")):
            yield (
                f"{other} holds a run of {found[1]} epochs with these flags, but this run starts from scratch; to "
                "train that run longer, add --branch with the path of its newest checkpoint"
            )


def _about_the_disk(training: Training) -> Iterator[str]:
    run = training.run
    if training.progress.step < run.plan.last_step(training.config.max_steps):
        space = disk_space(run.folder, training.config, run.plan, training.learner)
        yield from space_warnings(run.folder, space)
