"""Training: the story told once, and the acts it is made of (an epoch, a validation)."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lars import benchmark, comm, launched, schedules
from lars.config import Config, UsageError, flag_name, of_all_ranks
from lars.interrupt import Interrupt, Preempted
from lars.learner import Batch, Learner, Notice, moving_average
from lars.logs import Row, Silence, table
from lars.metrics import Sums, means
from lars.models import build
from lars.models.sync_batch_norm import synchronised
from lars.optim import create_optimizer
from lars.optim.lars import usual_eps
from lars.optim.update import choose_path
from lars.plan import Plan, make_plan
from lars.run import (
    Found,
    Progress,
    Run,
    claimed,
    find,
    refuse_another_run,
    run_folder,
    same_run,
    versions,
)
from lars.watchdog import Watchdog

# Parameters of glibc's mallopt (malloc.h) and what they are set to, in bytes.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = (-1, 2**31 - 1), (-2, 256 << 20), (-3, 2**31 - 1)

# The optimizers that torch has fused kernels for; those of this library choose for themselves.
FUSED = ("sgd", "adam", "adamw", "adagrad")

# What noise stands for.
IMAGENET_SIZE, IMAGENET_CLASSES = 1_281_167, 1000


class NonFiniteError(RuntimeError):
    """Training has broken down: steps are not finite any more."""

    exit_code = 5


def train(config: Config, source: Any, interrupt: Interrupt | None = None) -> None:
    """Train a network from the first epoch, or from where an earlier run of the same command stopped.

    Whatever goes wrong on one rank ends the job on all of them, with one message and one exit code.

    Args:
        config: What the user said.
        source: Where the images come from; see the contract in data/__init__.py.
        interrupt: Listens to the signals; a script that wants to hear those that come while torch is loading makes
            it before. None: one that listens from now.
    """
    with comm.ending_together() as worlds:
        interrupt = interrupt or Interrupt(config.stop_signals)
        cpus = launched.allotted_cpus()
        workers = pick_workers(config, cpus)
        if config.benchmark != "noise":
            source.check()
            source.start_workers(workers)
        world = comm.start(
            on_cpu=config.no_cuda or not torch.cuda.is_available(),
            stall_seconds=config.stall_seconds,
        )
        worlds.append(world)
        watchdog = Watchdog(world, config.stall_seconds)
        agree(world, config, source)
        train_size = IMAGENET_SIZE if config.benchmark == "noise" else source.train_size
        plan = make_plan(config, size=world.size, train_size=train_size)
        if config.benchmark:
            interrupt.release()
            _measure(config, source, world, watchdog, plan, cpus=cpus, workers=workers)
            return

        def waiting() -> None:
            watchdog.beat("waiting for the run folder")
            if interrupt.received is not None:
                raise Preempted("asked to stop; nothing was begun")

        folder = run_folder(config)
        with claimed(folder, waiting) if world.is_root else contextlib.nullcontext():
            _train(config, source, world, watchdog, interrupt, plan, cpus=cpus, workers=workers)


def _train(
    config: Config,
    source: Any,
    world: comm.World,
    watchdog: Watchdog,
    interrupt: Interrupt,
    plan: Plan,
    *,
    cpus: int,
    workers: int,
) -> None:
    device = pick_device(config, world, cpus)
    folder = run_folder(config)
    found = find(config, folder, world)
    if found is not None:
        refuse_another_run(found, same_run(config, source))
        plan = same_effective_batch(config, plan, found)
    run = Run(config, source, plan, world, folder)

    refuse_single_samples(config, plan, source.image_size)
    learner = make_learner(config, plan, source.num_classes, world, device)
    progress = run.resume(found, learner)
    log = run.open(progress)
    log.say(summary(config, source, plan, device, run, progress, found, cpus=cpus, workers=workers))

    share = share_of(config, plan, world)
    train_loader = source.train_loader(share, workers)
    val_loader = source.val_loader(share, workers)
    to_device = partial(normalised, mean=source.mean, std=source.std, device=device)
    cadence = Cadence(config)

    batches = map(to_device, train_loader.batches_from(progress.step))
    over = progress.step == plan.total_steps or cadence.over(progress)
    while not over:
        train_epoch(
            learner,
            batches,
            plan,
            progress,
            cadence,
            interrupt,
            watchdog=watchdog,
            world=world,
            log=log,
        )
        if progress.step % plan.steps_per_epoch == 0:
            world.average_buffers(learner.rank_tensors())
            same_weights(world, learner.model)
            validate(
                learner,
                val_loader,
                to_device,
                source.val_size,
                plan,
                progress,
                watchdog=watchdog,
                world=world,
                log=log,
            )
            log.say(epoch_line(*progress.history[-2:]))
        watchdog.beat("writing a checkpoint")
        list_bad_images((train_loader, val_loader), progress, world, log)
        over = progress.step == plan.total_steps or cadence.over(progress)
        run.save(learner, progress, last=cadence.stop or over)
        cadence.saved()
        if cadence.stop:
            world.barrier("saved")
            log.close()
            raise Preempted(
                f"asked to stop; saved after step {progress.step}: the same command goes on"
            )
    watchdog.stop()
    train_loader.close()
    if progress.step % plan.steps_per_epoch:
        world.average_buffers(learner.rank_tensors())
    run.export(learner.judged)
    log.say(closing(plan, progress, run))
    log.close()


def _measure(
    config: Config,
    source: Any,
    world: comm.World,
    watchdog: Watchdog,
    plan: Plan,
    *,
    cpus: int,
    workers: int,
) -> None:
    """Take steps as in training, for the sake of their speed."""
    device = pick_device(config, world, cpus)
    noise = config.benchmark == "noise"
    refuse_single_samples(config, plan, source.image_size)
    learner = make_learner(
        config,
        plan,
        IMAGENET_CLASSES if noise else source.num_classes,
        world,
        device,
    )
    if noise:
        batch = benchmark.noise(plan.batch_size, source.image_size, IMAGENET_CLASSES)
        batches: Iterator[Batch] = itertools.repeat(batch)
    else:
        loader = source.train_loader(share_of(config, plan, world), workers)
        batches = loader.batches_from(0)
    to_device = partial(normalised, mean=source.mean, std=source.std, device=device)
    steps = 50 if config.max_steps is None else config.max_steps
    speed = benchmark.measure(learner, batches, to_device, plan, steps=steps, beat=watchdog.beat)
    watchdog.stop()
    if world.is_root:
        print(
            table(
                [
                    (
                        "measured",
                        f"{config.model} on {device.type}, {config.base_op}, amp {config.amp}",
                    ),
                    ("images", f"{source.image_size} px, {config.benchmark}"),
                    ("effective batch", effective_batch(plan)),
                    *benchmark.report(speed, plan),
                ]
            )
        )
    if not noise:
        loader.close()


@dataclass(frozen=True)
class Share:
    """Which samples one rank takes."""

    rank: int
    size: int
    batch_size: int
    effective_batch_size: int
    val_batch_size: int
    drop_last: bool
    seed: int


def share_of(config: Config, plan: Plan, world: comm.World) -> Share:
    """Return this rank's share of the samples."""
    return Share(
        world.rank,
        world.size,
        plan.batch_size,
        plan.effective_batch_size,
        config.val_batch_size,
        config.drop_last,
        config.seed,
    )


class Cadence:
    """When training pauses: for a checkpoint, or for good."""

    def __init__(self, config: Config) -> None:
        """Take the flags that say so."""
        self.steps = config.checkpoint_steps
        self.seconds = None if config.checkpoint_minutes is None else 60 * config.checkpoint_minutes
        self.last_step = config.max_steps
        self.log_every = config.log_every
        self.most_skipped = config.max_skipped_steps
        self.stop = False
        self.saved()

    def saved(self) -> None:
        """Count the time from now."""
        self.since = time.monotonic()

    def save_is_due(self) -> bool:
        """Whether enough minutes have passed; only the root's clock counts."""
        return self.seconds is not None and time.monotonic() - self.since >= self.seconds

    def over(self, progress: Progress) -> bool:
        """Whether the last step that was asked for has been taken."""
        return self.last_step is not None and progress.step >= self.last_step

    def pause(self, progress: Progress, notice: Notice) -> bool:
        """Whether to save now; all ranks say the same."""
        self.stop = notice.stop
        by_steps = self.steps is not None and progress.step % self.steps == 0
        return notice.stop or notice.save or by_steps or self.over(progress)


def train_epoch(
    learner: Learner,
    batches: Iterator[Batch],
    plan: Plan,
    progress: Progress,
    cadence: Cadence,
    interrupt: Interrupt,
    *,
    watchdog: Watchdog,
    world: comm.World,
    log: Silence,
) -> None:
    """Take steps to the end of the epoch, or to the next pause; the epoch's row is written when it is done."""
    learner.model.train()
    epoch, first = divmod(progress.step, plan.steps_per_epoch)
    bar = log.progress(f"epoch {epoch + 1}", total=plan.steps_per_epoch, start=first)
    sums = Sums(learner.device, progress.window)
    began = logged = time.perf_counter()
    samples, done, pause = 0, False, False
    for k in range(first, plan.steps_per_epoch):
        watchdog.beat(f"step {progress.step + 1}")
        count = plan.micro_batches_in_step(k)
        notice = learner.step(
            itertools.islice(batches, count),
            step=progress.step,
            count=count,
            samples=plan.samples_in_step(k),
            sums=sums,
            stop=interrupt.received is not None,
            save=world.is_root and cadence.save_is_due(),
        )
        progress.step += 1
        samples += plan.samples_in_step(k)
        count_skipped(progress, notice, cadence.most_skipped, log)
        done, pause = k == plan.steps_per_epoch - 1, cadence.pause(progress, notice)
        note = ""
        if progress.step % cadence.log_every == 0 or done:
            totals = world.sum(sums.totals.cpu(), "train metrics")
            progress.totals += totals
            now = time.perf_counter()
            values = means(totals) | {"lr": learner.lr_at(progress.step - 1)}
            speed = {"images_per_second": samples / (now - logged)}
            log.scalars("train", values | speed, progress.step)
            note = "loss {loss:.3f}  top1 {top1:.2f}  lr {lr:.4g}".format(**values)
            sums, logged, samples = Sums(learner.device), now, 0
        bar.advance(note)
        if pause:
            break
    bar.close()
    progress.window = sums.totals.cpu()
    progress.seconds += time.perf_counter() - began
    if done:
        log.row(row("train", learner, plan, progress, progress.totals, progress.seconds))
        progress.totals, progress.seconds = torch.zeros_like(progress.totals), 0.0


def count_skipped(progress: Progress, notice: Notice, most: int, log: Silence) -> None:
    """Count a step that was not taken, and say why; too many in a row that were not finite end the job."""
    if notice.taken:
        progress.skipped_in_a_row = 0
        return
    progress.skipped += 1
    log.say(f"warning: step {progress.step} skipped ({progress.skipped} in all): {notice.cause}")
    if not notice.broken:
        return
    progress.skipped_in_a_row += 1
    if progress.skipped_in_a_row >= most:
        raise NonFiniteError(
            f"{most} steps in a row were {notice.cause}; the last checkpoint is as it was. "
            "Lower --base-lr, lengthen --warmup-epochs, or give --clip-grad-norm"
        )


@torch.no_grad()
def validate(
    learner: Learner,
    loader: Any,
    to_device: Callable[[Batch], Batch],
    val_size: int,
    plan: Plan,
    progress: Progress,
    *,
    watchdog: Watchdog,
    world: comm.World,
    log: Silence,
) -> None:
    """Measure the network on every validation image, once each over all ranks; the ranks may differ in batches."""
    model = learner.judged.eval()
    began = time.perf_counter()
    sums = Sums(learner.device)
    for number, (images, labels) in enumerate(map(to_device, loader), start=1):
        watchdog.beat(f"batch {number} of the validation")
        learner.forward(images, labels, sums, model)
    totals = world.sum(sums.totals.cpu(), "validation metrics")
    unreadable = sum(world.gather_objects(len(loader.bad_images), "unreadable"))
    if int(totals[3]) + unreadable != val_size:
        counted = f"{int(totals[3])} images, and {unreadable} that cannot be read"
        raise RuntimeError(f"validation counted {counted}, not {val_size}: did the files change?")
    log.row(row("val", learner, plan, progress, totals, time.perf_counter() - began))
    log.scalars("val", means(totals), progress.step)


def list_bad_images(
    loaders: Iterable[Any], progress: Progress, world: comm.World, log: Silence
) -> None:
    """Write what could not be read, on any rank so far, into the run folder."""
    mine = [message for loader in loaders for message in loader.bad_images]
    told = sorted(set(progress.bad_images).union(*world.gather_objects(mine, "bad images")))
    if (
        told
    ):  # each time: a run that began from another's checkpoint, or on a full disk, has no such file
        log.record("bad_images.json", told)
    if told != progress.bad_images:
        log.say(f"warning: {len(told)} images cannot be read; they are listed in bad_images.json")
        progress.bad_images = told


def row(
    split: str, learner: Learner, plan: Plan, progress: Progress, totals: Tensor, seconds: float
) -> Row:
    """Add a row to the history, and return it: one line of metrics.jsonl."""
    new = {
        "split": split,
        "epoch": progress.step // plan.steps_per_epoch,
        "step": progress.step,
        **means(totals),
        "lr": learner.lr_at(progress.step - 1),
        "images_per_second": round(int(totals[3]) / seconds, 2),
        "seconds": round(seconds, 3),
    }
    progress.history.append(new)
    return new


def normalised(
    batch: Batch, *, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> Batch:
    """Bring a batch to the device; uint8 pixels become floats there, (x - mean) / std in each channel."""
    images, labels = (part.to(device, non_blocking=True) for part in batch)
    if images.dtype == torch.uint8:
        shift, scale = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std)
        )
        images = images.float().sub_(shift).div_(scale)
    return images, labels


def reseed(seed: int, step: int, micro_batch: int, *, rank: int, size: int) -> None:
    """Make what is random in a forward pass (dropout) a function of its place in the run.

    The place is the seed, the step, and the micro-batch's number in the step over all ranks; so every factorisation
    of ranks times accumulation draws the same, and nothing has to be saved to resume.
    """
    place = (step << 24) + micro_batch * size + rank
    torch.manual_seed((seed + place * 0x9E3779B97F4A7C15) % 2**63)


def schedule(config: Config, plan: Plan) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer step, from 0."""
    if config.lr_schedule == "step":
        return partial(
            schedules.step_decay,
            peak=plan.peak_lr,
            milestones=[epoch * plan.steps_per_epoch for epoch in config.lr_decay],
            warmup_steps=plan.warmup_steps,
        )
    decay = {
        "peak": plan.peak_lr,
        "total_steps": plan.total_steps,
        "warmup_steps": plan.warmup_steps,
        "end_lr": config.end_lr,
    }
    if config.lr_schedule == "cosine":
        return partial(schedules.cosine, **decay)
    power = config.lr_power
    if power is None:
        power = 2.0 if config.base_op in ("lars", "tvlars") else 1.0
    return partial(schedules.polynomial, **decay, power=power)


def make_learner(
    config: Config, plan: Plan, num_classes: int, world: comm.World, device: torch.device
) -> Learner:
    """Build the network, the same on every rank, and what makes it learn."""
    torch.manual_seed(config.seed)
    model = build(config.model, num_classes, zero_init_last_gamma=config.zero_init_last_gamma)
    if config.sync_bn and world.size > 1:
        # A function, since a copy of the model (the moving average) must not copy the world.
        model = synchronised(model, lambda tensor, name: world.sum(tensor, name))
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(device).to(memory_format=layout)  # type: ignore[call-overload]
    world.broadcast_model(model)
    average = None if config.ema_decay is None else moving_average(model, config.ema_decay)
    # torch's fused kernels ignore strides: autograd gives each gradient the layout of its parameter.
    options: dict[str, Any] = {"fused": True} if config.base_op in FUSED else {}
    if config.base_op == "lars":
        eps = usual_eps(config.lars_form) if config.epsilon is None else config.epsilon
        options = {"form": config.lars_form, "eps": eps}
        if config.trust_coefficient is not None:
            options["trust_coefficient"] = config.trust_coefficient
    optimizer = create_optimizer(
        config.base_op,
        model,
        lr=plan.peak_lr,
        momentum=config.momentum,
        weight_decay=config.wd,
        bn_bias_separately=config.bn_bias_separately,
        **options,
    )
    gradients = world.gradients(model.parameters(), fp16=config.fp16_allreduce)
    if config.compile:
        model.compile()
    return Learner(
        model,
        optimizer,
        gradients,
        lr_at=schedule(config, plan),
        label_smoothing=config.label_smoothing,
        clip_grad_norm=config.clip_grad_norm,
        amp=config.amp,
        average=average,
        in_step=config.sync_bn,
        reseed=partial(reseed, config.seed, rank=world.rank, size=world.size),
    )


def refuse_single_samples(config: Config, plan: Plan, image_size: int) -> None:
    """Try the smallest batch that BatchNorm meets in an epoch, if it is a single sample: over one pixel, too, it fails.

    Raises:
        UsageError: The epoch would end in an error.
    """
    group = batch_norm_samples(config, plan)
    last = plan.samples_in_step(plan.steps_per_epoch - 1)
    if group > 1 and last % group != 1:
        return
    try:
        with torch.no_grad():
            build(config.model, 2).train()(torch.zeros(1, 3, image_size, image_size))
    except ValueError as error:
        rest = f"an epoch of {plan.train_size} samples leaves one for its last micro-batch"
        raise UsageError(
            f"--batch-size {plan.batch_size}: {rest if group > 1 else 'a micro-batch is one sample'}, over "
            f"which this net has no BatchNorm statistics at {image_size} px ({error}); take another --batch-size, "
            "--drop-last, or larger images"
        ) from error


def same_effective_batch(config: Config, plan: Plan, found: Found) -> Plan:
    """Keep a resumed run's samples per step on another number of ranks, by another accumulation.

    Raises:
        UsageError: The flags ask for other samples per step, or these ranks cannot make as many.
    """
    there = found.state["same_run"]["effective_batch_size"]
    if there == plan.effective_batch_size:
        return plan
    for name in ("effective_batch_size", "batches_per_allreduce"):
        before, value = found.state["said"]["flags"][name], getattr(config, name)
        if value != before:
            raise UsageError(
                f"{flag_name(name)} {value}: {found.path} was made with {before}, in steps of {there} samples; "
                f"they would have {plan.effective_batch_size} now: give the same, or another --run-name"
            )
    micro_batches = there // plan.batch_size
    if micro_batches % plan.size:
        fit = ", ".join(
            str(size) for size in range(1, micro_batches + 1) if micro_batches % size == 0
        )
        raise UsageError(
            f"--resume: {found.path} was made in steps of {there} samples, which {plan.size} ranks with --batch-size "
            f"{plan.batch_size} cannot take; these numbers of ranks can: {fit}"
        )
    config = replace(config, effective_batch_size=there, batches_per_allreduce=1)
    return make_plan(config, size=plan.size, train_size=plan.train_size)


def agree(world: comm.World, config: Config, source: Any) -> None:
    """Refuse to train when the ranks were not started alike.

    Raises:
        UsageError: A rank has other flags, data, devices or versions than the root; it is named, with what differs.
    """
    mine = of_all_ranks(config, source) | versions(source)
    device = "cpu" if config.no_cuda or not torch.cuda.is_available() else "cuda"
    mine |= {"device": device, "optimizer_path": choose_path(torch.device(device))}
    if config.benchmark != "noise":
        mine |= same_run(config, source) | {"val_size": source.val_size}
    told = world.gather_objects(mine, "agreement")
    for rank, theirs in enumerate(told):
        for name, value in theirs.items():
            if value != told[0][name]:
                raise UsageError(
                    f"rank {rank} has {name} = {value!r}, but rank 0 has {told[0][name]!r}"
                )


def same_weights(world: comm.World, model: nn.Module) -> None:
    """Compare a checksum of the weights over the ranks.

    Raises:
        RuntimeError: A rank has drifted from the root; it is named.
    """
    checksum = 0
    for parameter in model.parameters():
        values = parameter.detach().cpu().contiguous().flatten()
        checksum = zlib.crc32(values.view(torch.uint8).numpy().tobytes(), checksum)
    told = world.gather_objects(checksum, "weights")
    others = [rank for rank, theirs in enumerate(told) if theirs != told[0]]
    if others:
        raise RuntimeError(
            f"the weights of ranks {others} are no longer those of rank 0 (a fault of memory or network?); "
            "the last checkpoint is as it was"
        )


def pick_device(config: Config, world: comm.World, cpus: int) -> torch.device:
    """This rank's GPU, or the CPU."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cpus)
    if config.no_cuda or not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"{world.local_rank + 1} or more ranks were started on a host with {torch.cuda.device_count()} GPUs; "
            "start one rank per GPU, or give --no-cuda"
        )
    torch.cuda.set_device(world.local_rank)
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda", world.local_rank)


def keep_freed_memory() -> None:
    """Let glibc keep the big blocks that each step frees and takes again, instead of returning them to the kernel.

    It saves the page faults of every step. The user's own MALLOC_ variables win.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in (_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD):
            mallopt(parameter, value)


def pick_workers(config: Config, cpus: int) -> int:
    """Decoding processes of this rank."""
    if config.single_threaded:
        if config.workers:
            raise UsageError(
                f"--single-threaded means --workers 0, but --workers {config.workers} is given too"
            )
        return 0
    return cpus - 1 if config.workers is None else config.workers


def summary(
    config: Config,
    source: Any,
    plan: Plan,
    device: torch.device,
    run: Run,
    progress: Progress,
    found: Found | None,
    *,
    cpus: int,
    workers: int,
) -> str:
    """What was said, and what it means here."""
    last = plan.samples_in_step(plan.steps_per_epoch - 1)
    short = "" if last == plan.effective_batch_size else f", the last of {last} samples"
    images = f"{plan.train_size} to train on, {source.val_size} to validate, {source.num_classes} classes"
    rows = [
        ("images", images),
        ("model", f"{config.model} on {device.type}, {config.base_op}"),
        ("ranks", f"{plan.size}, with {cpus} CPUs and {workers} decoding processes each"),
        ("effective batch", effective_batch(plan)),
        ("BatchNorm", f"statistics over {batch_norm_samples(config, plan)} samples"),
        ("steps", f"{plan.total_steps} = {config.epochs} epochs x {plan.steps_per_epoch}{short}"),
        (
            "learning rate",
            f"{plan.warmup_steps:g} steps of warm-up to {plan.peak_lr:g}, then {config.lr_schedule}",
        ),
        ("run folder", run.folder),
        ("to watch it", f"tensorboard --logdir {config.log_dir}"),
    ]
    if found is not None:
        epochs, steps = divmod(progress.step, plan.steps_per_epoch)
        place = f"epoch {epochs + 1}, step {steps}" if steps else f"epoch {epochs}"
        rows.append(("going on after", f"{place} ({progress.step} of {plan.total_steps} steps)"))
        size = found.state["said"]["plan"]["size"]
        if size != plan.size:
            rows.append(
                ("world changed", f"from {size} ranks to {plan.size}; the effective batch stays")
            )
    return table(rows)


def effective_batch(plan: Plan) -> str:
    """What the samples of a step are made of."""
    parts = f"{plan.size} ranks x {plan.accumulation} micro-batches x {plan.batch_size} samples"
    return f"{plan.effective_batch_size} = {parts}"


def batch_norm_samples(config: Config, plan: Plan) -> int:
    """Samples of one BatchNorm statistic, which convergence depends on."""
    return plan.batch_size * (plan.size if config.sync_bn else 1)


def epoch_line(trained: Row, validated: Row) -> str:
    """One epoch in one line."""
    return (
        f"epoch {trained['epoch']:>3}  train loss {trained['loss']:.4f} top1 {trained['top1']:6.2f} %  "
        f"val loss {validated['loss']:.4f} top1 {validated['top1']:6.2f} % top5 {validated['top5']:6.2f} %  "
        f"lr {trained['lr']:.4g}  {trained['images_per_second']:.0f} images/s"
    )


def closing(plan: Plan, progress: Progress, run: Run) -> str:
    """The end of the story."""
    state = (
        "finished" if progress.step == plan.total_steps else f"stopped after step {progress.step}"
    )
    best = progress.best()
    if best is not None:
        last = next(r for r in reversed(progress.history) if r["split"] == "val")
        state += (
            f": val top1 {last['top1']:.2f} %, best {best['top1']:.2f} % (epoch {best['epoch']})"
        )
    return f"{state}\n{run.folder}"
