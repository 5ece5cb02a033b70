"""Building a learner from the flags: the network, its optimizer, its learning rate and its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from random import Random
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lars import models, schedules
from lars.comm.gradients import make_gradients
from lars.comm.world import World
from lars.config.config import Config
from lars.config.optimizer_flags import optimizer_row
from lars.config.plan import Plan
from lars.importing import is_import_path
from lars.learner.average import moving_average
from lars.learner.device import pick_device
from lars.learner.imported import excluded, make_imported
from lars.learner.learner import Learner
from lars.learner.task import Batch, Setup, Task
from lars.learner.trial import refuse_impossible_batches, refuse_other_outputs
from lars.models.sync_batch_norm import synchronised
from lars.names import OPTIMIZERS
from lars.optim import create_optimizer
from lars.optim.base import class_named
from lars.optim.groups import scale_rate
from lars.optim.lars import usual_eps


def learner(
    config: Config,
    plan: Plan,
    source: Any,
    world: World,
    initialise: Callable[[nn.Module], None] = lambda model: None,
) -> Learner:
    """Build the network on this rank's device, equal on every rank, with its optimizer and its task.

    `initialise`: see `setup`.

    Raises:
        UsageError: The network cannot be built, or it cannot learn from batches of this size.
    """
    device = pick_device(config.no_cuda, world)
    model, task, rates, augment = setup(config, source, world, initialise)
    refuse_impossible_batches(model, config, plan, source)
    return make_learner(config, plan, task, model, world, device, rates=rates, augment=augment)


def setup(
    config: Config,
    source: Any,
    world: World,
    initialise: Callable[[nn.Module], None] = lambda model: None,
) -> Setup:
    """Build the network and the task on the CPU with the function that `config.task` names.

    Args:
        config: The flags.
        source: The source of the images.
        world: The ranks.
        initialise: Replaces the initial weights of the network that --model names, on the root at least.

    Raises:
        UsageError: The network cannot be built, or the flags do not fit the task.
    """
    model = build_model(config, source.num_classes)
    refuse_other_outputs(model, config, source)
    initialise(model)
    chosen: Setup = class_named(config.task)(config, source, world, model)
    return chosen


def build_model(config: Config, num_classes: int) -> nn.Module:
    """Build the network on the CPU and initialise it from the seed."""
    torch.manual_seed(config.seed)
    return models.build(
        config.model,
        num_classes,
        small_stem=config.small_stem,
        weight_init=config.weight_init,
        zero_init_last_gamma=config.zero_init_last_gamma,
    )


def make_learner(
    config: Config,
    plan: Plan,
    task: Task,
    model: nn.Module,
    world: World,
    device: torch.device,
    *,
    rates: Mapping[str, float] = MappingProxyType({}),
    augment: Callable[[Batch, Random], Batch] | None = None,
) -> Learner:
    """Move the network to its device, build its optimizer, and assemble the learner.

    See `Setup` for `rates` and `augment`.
    """
    if config.sync_bn and world.size > 1:
        # A function and not a bound method, so that a copy of the model (the moving average) does not copy the world.
        model = synchronised(model, lambda tensor, name: world.all_reduce(tensor, name))
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(device).to(memory_format=layout)  # type: ignore[call-overload]
    world.broadcast_model(model)
    average = None
    if config.ema_decay is not None:
        average = moving_average(model, config.ema_decay, warmup=config.ema_warmup)
    optimizer = make_optimizer(config, model, plan.peak_lr)
    for factor in dict.fromkeys(rates.values()):  # one group for all that share a factor
        prefixes = tuple(prefix for prefix, each in rates.items() if each == factor)
        own = [p for name, p in model.named_parameters() if name.startswith(prefixes)]
        scale_rate(optimizer, own, factor)
    gradients = make_gradients(model.parameters(), world, reduce_dtype=reduce_dtype(config))
    if config.compile:
        model.compile()
    return Learner(
        model,
        optimizer,
        gradients,
        task,
        lr_at=schedule(config, plan),
        clip_grad_norm=config.clip_grad_norm,
        amp=config.amp,
        average=average,
        forward_is_collective=config.sync_bn,
        reseed=partial(reseed, config.seed, rank=world.rank, size=world.size),
        augment=partial(augmented, augment, config.seed, rank=world.rank, size=world.size),
    )


def reduce_dtype(config: Config) -> torch.dtype | None:
    """The type in which the ranks exchange gradients. None: that of the gradients."""
    if config.bf16_allreduce:
        return torch.bfloat16
    return torch.float16 if config.fp16_allreduce else None


# Fields of `Config` that have a different name in the optimizers' constructors.
_OPTIONS = {"epsilon": "eps", "lars_form": "form", "lamb_form": "form"}


def make_optimizer(config: Config, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Build the optimizer that the flags choose, with the options that belong to it."""
    if is_import_path(config.base_op):
        return make_imported(config, model, lr)
    row = OPTIMIZERS[config.base_op]
    given = {name: getattr(config, name) for name in row.flags}
    options = {_OPTIONS.get(k, k): value for k, value in given.items() if value is not None}
    if row.torch_fused:
        # torch's fused kernels ignore strides. This is correct because each gradient has its parameter's layout.
        options["fused"] = True
    if config.base_op == "lars" and config.epsilon is None:
        options["eps"] = usual_eps(config.lars_form)
    return create_optimizer(
        config.base_op,
        model,
        lr=lr,
        weight_decay=config.wd,
        exclude=excluded(config),
        **options,
    )


def schedule(config: Config, plan: Plan) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer step, from 0."""
    name, peak = config.lr_schedule, plan.peak_lr
    warm_up = {"peak": peak, "warmup_steps": plan.warmup_steps}
    if config.warmup_multiplier is not None:
        warm_up["start_factor"] = 1 / config.warmup_multiplier
    if name in ("constant", "none"):
        return partial(schedules.warmup, **warm_up)
    if name == "step":
        milestones = [epoch * plan.steps_per_epoch for epoch in config.lr_decay]
        return partial(schedules.step_decay, **warm_up, milestones=milestones)
    if name == "ramp":
        return partial(
            schedules.ramp, peak=peak, start_lr=config.base_lr, total_steps=plan.total_steps
        )
    decay = warm_up | {"total_steps": plan.total_steps}
    if name == "lars-warm":
        return partial(schedules.cosine, **decay, end_lr=0.001 * peak)
    if name == "cosine":
        return partial(schedules.cosine, **decay, end_lr=config.end_lr)
    power = optimizer_row(config.base_op).lr_power if config.lr_power is None else config.lr_power
    if name == "polynomial":
        return partial(schedules.polynomial, **decay, end_lr=config.end_lr, power=power)
    return partial(
        schedules.epochwise_polynomial,
        peak=peak,
        steps_per_epoch=plan.steps_per_epoch,
        warmup_epochs=int(config.warmup_epochs),
        decay_epochs=config.epochs,
        start_factor=warm_up.get("start_factor", 0.0),
        end_lr=config.end_lr,
        power=power,
    )


def reseed(seed: int, step: int, micro_batch: int, *, rank: int, size: int) -> None:
    """Seed the randomness of a forward pass (dropout) from its place in the run.

    The place consists of the step and the number of the micro-batch within the step over all ranks. So every split
    into ranks and accumulation draws the same numbers, and a checkpoint need not store the generator.
    """
    place = (step << 24) + micro_batch * size + rank
    torch.manual_seed((seed + place * 0x9E3779B97F4A7C15) % 2**63)


def augmented(
    augment: Callable[[Batch, Random], Batch] | None,
    seed: int,
    batch: Batch,
    step: int,
    micro_batch: int,
    *,
    rank: int,
    size: int,
) -> Batch:
    """Change a micro-batch of the training with random numbers that depend on its place in the run, as in `reseed`."""
    if augment is None:
        return batch
    return augment(batch, Random(f"{seed} {step} {micro_batch * size + rank}"))
