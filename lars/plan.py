"""What the user's words mean in this world: computed once, printed once, kept in the checkpoint.

No other file multiplies by the number of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lars.config import Config, UsageError


@dataclass(frozen=True)
class Plan:
    """The arithmetic of one run.

    Attributes:
        size: Ranks.
        batch_size: Samples per micro-batch.
        accumulation: Micro-batches per rank and full step.
        effective_batch_size: Samples per full step, over all ranks.
        train_size: Training samples.
        steps_per_epoch: Optimizer steps per epoch, a last short one included unless it is dropped.
        total_steps: Optimizer steps of the whole schedule.
        warmup_steps: Steps of warm-up; not rounded, since the schedules take fractions.
        peak_lr: Learning rate at the end of warm-up.
    """

    size: int
    batch_size: int
    accumulation: int
    effective_batch_size: int
    train_size: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: float
    peak_lr: float

    def samples_in_step(self, step: int) -> int:
        """Samples of step `step` (from 0) of an epoch, over all ranks."""
        return min(self.effective_batch_size, self.train_size - step * self.effective_batch_size)

    def micro_batches_in_step(self, step: int) -> int:
        """Micro-batches that every rank runs in step `step` (from 0) of an epoch, empty ones included."""
        return math.ceil(math.ceil(self.samples_in_step(step) / self.batch_size) / self.size)


def make_plan(config: Config, *, size: int, train_size: int) -> Plan:
    """Work out a run.

    Args:
        config: What the user said.
        size: Number of ranks.
        train_size: Number of training samples.

    Raises:
        UsageError: The flags do not fit this world or this data set; the message names the flag and the fix.
    """
    accumulation = _accumulation(config, size)
    effective = config.batch_size * size * accumulation
    full_steps, rest = divmod(train_size, effective)
    steps_per_epoch = full_steps if config.drop_last else full_steps + bool(rest)
    if steps_per_epoch == 0:
        raise UsageError(
            f"--drop-last leaves nothing to train on: {train_size} samples are less than one step of {effective}; "
            "take a smaller --effective-batch-size (or --batch-size), or keep the short step"
        )
    k = size * accumulation
    return Plan(
        size=size,
        batch_size=config.batch_size,
        accumulation=accumulation,
        effective_batch_size=effective,
        train_size=train_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=config.epochs * steps_per_epoch,
        warmup_steps=config.warmup_epochs * steps_per_epoch,
        peak_lr=config.base_lr
        * {"keep": 1.0, "linear": k, "sqrt": math.sqrt(k)}[config.lr_scaling],
    )


def _accumulation(config: Config, size: int) -> int:
    wanted, per_pass = config.effective_batch_size, config.batch_size * size
    if wanted is None:
        return config.batches_per_allreduce
    if wanted % per_pass:
        below = wanted - wanted % per_pass
        near = f"{below} or {below + per_pass}" if below else f"{per_pass}"
        raise UsageError(
            f"--effective-batch-size {wanted} is not a multiple of --batch-size {config.batch_size} x {size} ranks "
            f"= {per_pass}; take {near}, or another --batch-size"
        )
    if config.batches_per_allreduce not in (1, wanted // per_pass):
        raise UsageError(
            f"--effective-batch-size {wanted} means {wanted // per_pass} micro-batches per rank and step, but "
            f"--batches-per-allreduce says {config.batches_per_allreduce}; give one of the two"
        )
    return wanted // per_pass
