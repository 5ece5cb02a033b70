"""What the flags mean for this number of ranks and this data set.

The plan is computed once, printed once and kept in the checkpoint. No other file multiplies by the number of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lars.config.config import Config
from lars.errors import UsageError
from lars.names import SCHEDULES


@dataclass(frozen=True)
class Share:
    """The part of the data that one rank reads. data/__init__.py documents the contract of a source.

    Attributes:
        rank: This rank.
        size: Number of ranks.
        batch_size: Samples per micro-batch.
        effective_batch_size: Samples per full step, over all ranks.
        val_batch_size: Samples per validation batch.
        drop_last: Whether to leave out the short last step of an epoch.
        seed: Seed of the run.
    """

    rank: int
    size: int
    batch_size: int
    effective_batch_size: int
    val_batch_size: int
    drop_last: bool
    seed: int


@dataclass(frozen=True)
class Plan:
    """The arithmetic of one run. Steps count from 0 over the whole run.

    Attributes:
        size: Number of ranks.
        batch_size: Samples per micro-batch.
        accumulation: Micro-batches of one rank per full step.
        effective_batch_size: Samples per full step, over all ranks.
        train_size: Training samples.
        steps_per_epoch: Optimizer steps per epoch, including a short last step unless it is dropped.
        total_steps: Optimizer steps of the whole schedule.
        warmup_steps: Steps of warm-up. Not rounded, because the schedules accept fractions.
        peak_lr: Largest learning rate of the schedule, which is that at the end of warm-up.
        log_every: Steps between two readings of the training metrics.
        val_every: Epochs between two validations.
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
    log_every: int = 20
    val_every: int = 1

    def samples_in(self, step: int) -> int:
        """Samples of a step, over all ranks."""
        first = step % self.steps_per_epoch * self.effective_batch_size
        return min(self.effective_batch_size, self.train_size - first)

    def samples_before(self, step: int) -> int:
        """Samples of all steps before this one, over all epochs and ranks."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        last = self.steps_per_epoch - 1
        epoch = last * self.effective_batch_size + self.samples_in(last)
        return epochs * epoch + rest * self.effective_batch_size

    def micro_batch_sizes(self, step: int) -> list[int]:
        """Samples of each micro-batch of a step over all ranks. They are split evenly, as the contract demands."""
        samples = self.samples_in(step)
        batches = math.ceil(samples / self.batch_size)
        return [(i + 1) * samples // batches - i * samples // batches for i in range(batches)]

    def micro_batches_in(self, step: int) -> int:
        """Micro-batches that every rank runs in a step, including empty ones."""
        return math.ceil(math.ceil(self.samples_in(step) / self.batch_size) / self.size)

    def epoch_of(self, steps_done: int) -> int:
        """Number of finished epochs after this many steps."""
        return steps_done // self.steps_per_epoch

    def ends_epoch(self, steps_done: int) -> bool:
        """Whether this many steps complete an epoch."""
        return steps_done % self.steps_per_epoch == 0

    def reads_metrics(self, steps_done: int) -> bool:
        """Whether the training metrics are read after this many steps."""
        return steps_done % self.log_every == 0 or self.ends_epoch(steps_done)

    def validates(self, steps_done: int) -> bool:
        """Whether the network is validated after this many steps: every `val_every` epochs and after the last one."""
        epochs, rest = divmod(steps_done, self.steps_per_epoch)
        return (
            rest == 0
            and epochs > 0
            and (epochs % self.val_every == 0 or steps_done == self.total_steps)
        )

    def last_step(self, max_steps: int | None) -> int:
        """The number of steps after which this job ends."""
        return self.total_steps if max_steps is None else min(max_steps, self.total_steps)

    def share(self, rank: int, config: Config) -> Share:
        """The part of the data that a rank reads."""
        return Share(
            rank=rank,
            size=self.size,
            batch_size=self.batch_size,
            effective_batch_size=self.effective_batch_size,
            val_batch_size=config.val_batch_size,
            drop_last=config.drop_last,
            seed=config.seed,
        )


def make_plan(config: Config, *, size: int, train_size: int) -> Plan:
    """Compute the plan of a run.

    Args:
        config: The user's flags.
        size: Number of ranks.
        train_size: Number of training samples.

    Raises:
        UsageError: The flags do not fit the number of ranks or the data set. The message names the flag and the fix.
    """
    accumulation = _accumulation(config, size)
    effective = config.batch_size * size * accumulation
    full_steps, rest = divmod(train_size, effective)
    steps_per_epoch = full_steps if config.drop_last else full_steps + bool(rest)
    if steps_per_epoch == 0:
        raise UsageError(
            f"--drop-last leaves no step to train: a step takes {effective} samples, but the training set has "
            f"{train_size}; lower --effective-batch-size (or --batch-size), or leave out --drop-last"
        )
    has_warmup = "warmup_epochs" in SCHEDULES[config.lr_schedule].flags
    warmup_steps = config.warmup_epochs * steps_per_epoch if has_warmup else 0.0
    starts_at_zero = warmup_steps > 0 and config.warmup_multiplier is None
    if config.epochs * steps_per_epoch <= 1 and starts_at_zero:
        raise UsageError(
            f"--warmup-epochs {config.warmup_epochs:g}: the only step of the run would have learning rate 0; lower "
            "--effective-batch-size (or --batch-size), or use --warmup-epochs 0"
        )
    return Plan(
        size=size,
        batch_size=config.batch_size,
        accumulation=accumulation,
        effective_batch_size=effective,
        train_size=train_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=config.epochs * steps_per_epoch,
        warmup_steps=warmup_steps,
        peak_lr=_peak_lr(config, size * accumulation, effective),
        log_every=config.log_every,
        val_every=config.val_every,
    )


def _peak_lr(config: Config, k: int, effective_batch_size: int) -> float:
    """The largest learning rate of the schedule; `k` is ranks x accumulation."""
    if config.lr_schedule == "ramp":
        return config.end_lr
    if config.lr_schedule == "lars-warm":
        return config.base_lr * effective_batch_size / 256
    scaled = config.base_lr * {"keep": 1.0, "linear": k, "sqrt": math.sqrt(k)}[config.lr_scaling]
    return scaled if config.warmup_multiplier is None else scaled * config.warmup_multiplier


def _accumulation(config: Config, size: int) -> int:
    wanted, per_pass = config.effective_batch_size, config.batch_size * size
    if wanted is None:
        return config.batches_per_allreduce
    if wanted % per_pass:
        below = wanted - wanted % per_pass
        near = f"{below} or {below + per_pass}" if below else f"{per_pass}"
        raise UsageError(
            f"--effective-batch-size {wanted} is not a multiple of --batch-size {config.batch_size} x {size} ranks "
            f"= {per_pass}; use {near}, or change --batch-size"
        )
    if config.batches_per_allreduce not in (1, wanted // per_pass):
        raise UsageError(
            f"--effective-batch-size {wanted} needs {wanted // per_pass} micro-batches per rank and step, but "
            f"--batches-per-allreduce is {config.batches_per_allreduce}; use only one of the two flags"
        )
    return wanted // per_pass
