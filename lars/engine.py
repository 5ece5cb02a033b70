"""Training: the story told once, and the acts it is made of (an epoch, a step, a validation)."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lars import comm, schedules
from lars.config import Config, UsageError
from lars.logs import Row, Silence, table
from lars.metrics import Sums, means
from lars.models import build
from lars.optim import create_optimizer
from lars.plan import Plan, make_plan
from lars.run import Progress, Run

Batch = tuple[Tensor, Tensor]


def train(config: Config, source: Any) -> None:
    """Train a network from the first epoch, or from where an earlier run of the same command stopped.

    Whatever goes wrong on one rank ends the job on all of them, with one message and one exit code.

    Args:
        config: What the user said.
        source: Where the images come from; see the contract in data/__init__.py.
    """
    with comm.ending_together() as worlds:
        cpus = comm.allotted_cpus()
        workers = pick_workers(config, cpus)
        source.check()
        if workers:
            source.start_workers()
        world = comm.start()
        worlds.append(world)
        _train(config, source, world, cpus=cpus, workers=workers)


def _train(config: Config, source: Any, world: comm.World, *, cpus: int, workers: int) -> None:
    plan = make_plan(config, size=world.size, train_size=source.train_size)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cpus)
    device = pick_device(world, no_cuda=config.no_cuda)

    torch.manual_seed(config.seed)
    model = build(
        config.model, source.num_classes, zero_init_last_gamma=config.zero_init_last_gamma
    )
    model.to(device)
    world.broadcast_model(model)
    optimizer = create_optimizer(
        config.base_op,
        model,
        lr=plan.peak_lr,
        momentum=config.momentum,
        weight_decay=config.wd,
        eps=config.epsilon if config.base_op == "lars" else None,
        bn_bias_separately=config.bn_bias_separately,
    )
    learner = Learner(
        model,
        optimizer,
        world.gradients(model.parameters(), fp16=config.fp16_allreduce),
        lr_at=schedule(config, plan),
        label_smoothing=config.label_smoothing,
        reseed=partial(reseed, config.seed, rank=world.rank, size=world.size),
    )

    run = Run(config, source, plan, world)
    progress = run.resume(model, optimizer)
    log = run.open(progress)
    log.say(summary(config, plan, device, run, progress, cpus=cpus, workers=workers))

    shares = {"rank": world.rank, "size": world.size, "workers": workers}
    train_loader = source.train_loader(
        batch_size=plan.batch_size,
        effective_batch_size=plan.effective_batch_size,
        drop_last=config.drop_last,
        seed=config.seed,
        **shares,
    )
    val_loader = source.val_loader(batch_size=config.val_batch_size, **shares)
    to_device = partial(normalised, mean=source.mean, std=source.std, device=device)

    last_step = min(config.max_steps or plan.total_steps, plan.total_steps)
    while progress.step < last_step:
        epoch, first = divmod(progress.step, plan.steps_per_epoch)
        steps = range(first, min(plan.steps_per_epoch, first + last_step - progress.step))
        batches = map(to_device, train_loader.epoch(epoch, first))
        train_epoch(
            learner, batches, steps, plan, progress, world=world, log=log, log_every=config.log_every,
            title=f"epoch {epoch + 1}/{config.epochs}",
        )  # fmt: skip
        if steps.stop == plan.steps_per_epoch:
            world.average_batch_norm(model)
            batches = map(to_device, val_loader)
            validate(learner, batches, source.val_size, plan, progress, world=world, log=log)
            log.say(epoch_line(*progress.history[-2:]))
        run.save(model, optimizer, progress)
    train_loader.close()
    log.say(closing(plan, progress, run))
    log.close()


class Learner:
    """What learns: a network, its optimizer, and the exchange of gradients between them."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        gradients: comm.LocalGradients,
        *,
        lr_at: Callable[[int], float],
        label_smoothing: float = 0.0,
        reseed: Callable[[int, int], None] = lambda step, micro_batch: None,
    ) -> None:
        """Put the parts together.

        Args:
            model: The network.
            optimizer: Its optimizer; its learning rate is set before every step.
            gradients: The exchange over the ranks.
            lr_at: Learning rate as a function of the optimizer step, from 0.
            label_smoothing: As torch.nn.functional.cross_entropy has it.
            reseed: Called with (step, number of this rank's micro-batch) before each forward pass.
        """
        self.model, self.optimizer, self.gradients = model, optimizer, gradients
        self.lr_at, self.label_smoothing, self.reseed = lr_at, label_smoothing, reseed

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def step(
        self, micro_batches: Iterable[Batch], *, step: int, count: int, samples: int, sums: Sums
    ) -> None:
        """Take one optimizer step: the gradient is the mean over all samples of all ranks, exchanged once.

        Args:
            micro_batches: This rank's (images, labels), one after another; one without images only keeps step.
            step: Number of this optimizer step in the run, from 0.
            count: Micro-batches to come.
            samples: Samples of this step over all ranks and micro-batches.
            sums: Takes this rank's losses and hits.
        """
        self.gradients.zero()
        arrived = 0
        for arrived, (images, labels) in enumerate(micro_batches, start=1):
            if arrived == count:
                self.gradients.begin_exchange()
            if len(labels) == 0:
                continue
            self.reseed(step, arrived - 1)
            loss = self.forward(images, labels, sums)
            # Every sample of the step weighs 1 / samples, in whichever micro-batch and on whichever rank it is.
            (loss / samples).backward()
        if arrived != count:
            raise RuntimeError(
                f"the loader gave {arrived} of the {count} micro-batches of step {step}"
            )
        self.gradients.finish_exchange()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(step)
        self.optimizer.step()

    def forward(self, images: Tensor, labels: Tensor, sums: Sums) -> Tensor:
        """Sum of the losses of a batch; the losses and hits are counted in `sums`."""
        logits = self.model(images)
        loss = nn.functional.cross_entropy(
            logits, labels, label_smoothing=self.label_smoothing, reduction="sum"
        )
        sums.add(loss, logits, labels)
        return loss


def train_epoch(
    learner: Learner,
    batches: Iterator[Batch],
    steps: range,
    plan: Plan,
    progress: Progress,
    *,
    world: comm.World,
    log: Silence,
    log_every: int,
    title: str,
) -> None:
    """Run `steps` of an epoch; `progress` advances, and gets the epoch's row when its last step is done."""
    learner.model.train()
    bar = log.progress(title, total=plan.steps_per_epoch, start=steps.start)
    window = Sums(learner.device, progress.window)
    began = logged = time.perf_counter()
    samples = 0
    for k in steps:
        micro_batches = itertools.islice(batches, plan.micro_batches_in_step(k))
        learner.step(
            micro_batches,
            step=progress.step,
            count=plan.micro_batches_in_step(k),
            samples=plan.samples_in_step(k),
            sums=window,
        )
        progress.step += 1
        samples += plan.samples_in_step(k)
        note = ""
        if progress.step % log_every == 0 or k == plan.steps_per_epoch - 1:
            totals = world.sum(window.totals.cpu(), "train metrics")
            progress.totals += totals
            now = time.perf_counter()
            values = means(totals) | {"lr": learner.lr_at(progress.step - 1)}
            log.scalars(
                "train", values | {"images_per_second": samples / (now - logged)}, progress.step
            )
            note = "loss {loss:.3f}  top1 {top1:.2f}  lr {lr:.4g}".format(**values)
            window, logged, samples = Sums(learner.device), now, 0
        bar.advance(note)
    bar.close()
    progress.window = window.totals.cpu()
    progress.seconds += time.perf_counter() - began
    if steps.stop == plan.steps_per_epoch:
        log.row(row("train", learner, plan, progress, progress.totals, progress.seconds))
        progress.totals, progress.seconds = torch.zeros_like(progress.totals), 0.0


@torch.inference_mode()
def validate(
    learner: Learner,
    batches: Iterable[Batch],
    val_size: int,
    plan: Plan,
    progress: Progress,
    *,
    world: comm.World,
    log: Silence,
) -> None:
    """Measure the network on every validation image, once each over all ranks; the ranks may differ in batches."""
    learner.model.eval()
    began = time.perf_counter()
    sums = Sums(learner.device)
    for images, labels in batches:
        learner.forward(images, labels, sums)
    totals = world.sum(sums.totals.cpu(), "validation metrics")
    if int(totals[3]) != val_size:
        raise RuntimeError(
            f"validation counted {int(totals[3])} images, not {val_size}: did the files change?"
        )
    log.row(row("val", learner, plan, progress, totals, time.perf_counter() - began))
    log.scalars("val", means(totals), progress.step)


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
    power = config.lr_power
    if power is None:
        power = 2.0 if config.base_op in ("lars", "tvlars") else 1.0
    return partial(
        schedules.polynomial,
        peak=plan.peak_lr,
        total_steps=plan.total_steps,
        warmup_steps=plan.warmup_steps,
        end_lr=config.end_lr,
        power=power,
    )


def pick_device(world: comm.World, *, no_cuda: bool) -> torch.device:
    """This rank's GPU, or the CPU."""
    if no_cuda or not torch.cuda.is_available():
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"{world.local_rank + 1} or more ranks were started on a host with {torch.cuda.device_count()} GPUs; "
            "start one rank per GPU, or give --no-cuda"
        )
    torch.cuda.set_device(world.local_rank)
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda", world.local_rank)


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
    plan: Plan,
    device: torch.device,
    run: Run,
    progress: Progress,
    *,
    cpus: int,
    workers: int,
) -> str:
    """What was said, and what it means here."""
    last = plan.samples_in_step(plan.steps_per_epoch - 1)
    short = "" if last == plan.effective_batch_size else f", the last of {last} samples"
    batch = f"{plan.size} ranks x {plan.accumulation} micro-batches x {plan.batch_size} samples"
    rows = [
        ("model", f"{config.model} on {device.type}, {config.base_op}"),
        ("ranks", f"{plan.size}, with {cpus} CPUs and {workers} decoding processes each"),
        ("effective batch", f"{plan.effective_batch_size} = {batch}"),
        ("steps", f"{plan.total_steps} = {config.epochs} epochs x {plan.steps_per_epoch}{short}"),
        (
            "learning rate",
            f"{plan.warmup_steps:g} steps of warm-up to {plan.peak_lr:g}, then {config.lr_schedule}",
        ),
        ("run folder", run.folder),
        ("to watch it", f"tensorboard --logdir {config.log_dir}"),
    ]
    if progress.step:
        epochs, steps = divmod(progress.step, plan.steps_per_epoch)
        rows.append(
            ("going on after", f"{epochs} epochs" + (f" and {steps} steps" if steps else ""))
        )
    return table(rows)


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
