"""The text that a run prints at the start, after each epoch and at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lars import launcher
from lars.comm.start import choose_backend
from lars.config.config import Config
from lars.config.plan import Plan
from lars.learner.trial import batch_norm_samples, train_sizes
from lars.observe.plan_lines import plan_lines
from lars.run.progress import Progress

if TYPE_CHECKING:
    from lars.observe.observer import Training


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """Format rows as two aligned columns."""
    rows = [(name, str(value)) for name, value in rows]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def summary(training: Training, *, plot: bool = False) -> str:
    """The main flags and what they mean on these ranks. `plot`: draw the learning rate large."""
    config, source, run = training.config, training.source, training.run
    plan, device = run.plan, training.learner.device.type
    sizes = f"{plan.train_size} for training, {source.val_size} for validation"
    images = f"{sizes}, {source.num_classes} classes, {source.image_size} px"
    cpus = launcher.allotted_cpus()
    parameters = list(training.learner.model.parameters())
    count = f"{sum(p.numel() for p in parameters):,} parameters"
    if config.freeze_backbone:
        count += f", of which {sum(p.numel() for p in parameters if p.requires_grad):,} are trained"
    rows = [
        *([("data", source.description)] if source.description else []),
        ("images", images),
        *training_images(source),
        ("model", f"{config.model} on {device}, {count}, amp {config.amp}"),
        ("optimizer", f"{config.base_op}, weight decay {config.wd:g}, seed {config.seed}"),
        *loss(config),
        *moving_average(config),
        (
            "ranks",
            f"{plan.size}, CPUs per rank {cpus}, decoding processes per rank {training.workers}",
        ),
        *backend(training),
        ("effective batch", effective_batch(plan)),
        ("BatchNorm", batch_norm(config, plan)),
        ("steps", steps(config, plan)),
        *plan_lines(training, plot=plot),
        ("run folder", run.folder.resolve()),
        ("to watch it", f"tensorboard --logdir {run.folder.parent.resolve()}"),
    ]
    if training.loaded is not None:
        rows.append(("resuming after", place(training.progress, plan)))
        if training.loaded.ranks != plan.size:
            change = f"from {training.loaded.ranks} ranks to {plan.size}"
            rows.append(("world changed", f"{change}; the effective batch stays the same"))
    if training.progress.init:
        rows.append(("started with", initial_weights(training.progress.init)))
    if training.progress.branch:
        rows.append(("branched from", branch(training.progress)))
    return table(rows)


def training_images(source: Any) -> Iterator[tuple[str, str]]:
    """Yield rows with the sizes of the training images, unless all images have the same size, and the augmentation."""
    sizes = train_sizes(source)
    if any(size != source.image_size for _, size in sizes):
        stages = (f"{size} px from epoch {epoch} on" for epoch, size in sizes)
        yield "training images", ", ".join(stages)
    if augmentation := getattr(source, "augmentation", ""):
        yield "augmentation", augmentation


def backend(training: Training) -> Iterator[tuple[str, str]]:
    """Yield a row with the communication backend and the reason for its choice."""
    world = training.run.world
    if world.backend:
        _, why = choose_backend(training.config.backend)
        yield "backend", f"{world.backend} ({why})"


def loss(config: Config) -> Iterator[tuple[str, str]]:
    """Yield a row with the loss, its targets and the mixing of images. A task with a loss of its own has no row."""
    if config.task != Config.task:
        return
    parts = [{"ce": "cross-entropy", "bce": "binary cross-entropy"}[config.loss]]
    if config.loss == "bce":
        parts.append(f"{'sum' if config.bce_sum else 'mean'} over classes")
        if config.bce_target_threshold is not None:
            parts.append(f"targets above {config.bce_target_threshold:g} count as 1")
    if config.label_smoothing:
        parts.append(f"label smoothing {config.label_smoothing:g}")
    methods = [f"{name} {getattr(config, name):g}" for name in ("mixup", "cutmix")]
    mixing = " or ".join(method for method in methods if not method.endswith(" 0"))
    if mixing:
        parts.append(f"{mixing} in each micro-batch")
    yield "loss", ", ".join(parts)


def moving_average(config: Config) -> Iterator[tuple[str, str]]:
    """Yield a row with the decay of the moving average, if there is one."""
    if config.ema_decay is not None:
        start = ", lower in the first steps" if config.ema_warmup else ""
        yield "moving average", f"decay {config.ema_decay:g} per step{start}"


def effective_batch(plan: Plan) -> str:
    """The effective batch size as a product."""
    parts = (
        counted(plan.size, "rank"),
        counted(plan.accumulation, "micro-batch"),
        counted(plan.batch_size, "sample"),
    )
    return f"{plan.effective_batch_size} = {' x '.join(parts)}"


def counted(number: int, noun: str) -> str:
    """``1 rank``, ``2 ranks``, ``4 micro-batches``."""
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{number} {noun if number == 1 else plural}"


def batch_norm(config: Config, plan: Plan) -> str:
    """Where the statistics of BatchNorm come from."""
    if config.freeze_backbone:
        return "fixed statistics, because the backbone is frozen"
    return f"statistics over {batch_norm_samples(config, plan)} samples"


def steps(config: Config, plan: Plan) -> str:
    """The number of steps of the run as a product."""
    last = plan.samples_in(plan.steps_per_epoch - 1)
    short = "" if last == plan.effective_batch_size else f", the last of {last} samples"
    return f"{plan.total_steps} = {config.epochs} epochs x {plan.steps_per_epoch}{short}"


def place(progress: Progress, plan: Plan) -> str:
    """How far a run has come."""
    epochs, step = divmod(progress.step, plan.steps_per_epoch)
    where = f"epoch {epochs + 1}, step {step}" if step else f"epoch {epochs}"
    return f"{where} ({progress.step} of {plan.total_steps} steps)"


def branch(progress: Progress) -> str:
    """The checkpoint from which the run was branched, and the flags that changed."""
    changed = progress.branch["changed"].items()
    words = ", ".join(f"{name} {was} -> {now}" for name, (was, now) in changed) or "nothing changed"
    return f"{progress.branch['from']} after step {progress.branch['step']}: {words}"


def initial_weights(init: Mapping[str, Any]) -> str:
    """The file of --init, and how it fits; `init` is the record of `lars.run.initial.load`."""
    average = " (moving average)" if init["network"] == "val_ema" else ""
    heads = f", new head {', '.join(init['new_heads'])}" if init["new_heads"] else ""
    return f"{init['from']}{average}, SHA-256 {init['sha256'][:12]}{heads}"


def epoch_line(training: Training) -> str:
    """The results of an epoch in one line."""
    scales = training.learner.task.scales
    found = [training.progress.last(split) for split in ("train", *training.learner.networks())]
    rows = [row for row in found if row is not None]
    parts = "  ".join(f"{row['split']} {measured(scales, row)}" for row in rows)
    speed = f"{rows[0]['images_per_second']:.0f} images/s"
    return f"epoch {rows[0]['epoch']:>3}  {parts}  lr {rows[0]['lr']:.4g}  {speed}"


def measured(scales: Mapping[str, float], values: Mapping[str, float]) -> str:
    """The metrics in one line. Accuracies, whose scale is 100, are shown in percent."""
    return " ".join(
        f"{name} {values[name]:6.2f} %" if scale == 100 else f"{name} {values[name]:.4f}"
        for name, scale in scales.items()
    )


def closing(training: Training) -> str:
    """How the run ended."""
    progress, plan, metric = training.progress, training.run.plan, training.learner.task.best
    state = (
        "finished" if progress.step == plan.total_steps else f"stopped after step {progress.step}"
    )
    last, best = progress.last("val"), progress.best(metric)
    if last is not None and best is not None:
        place = f"epoch {best['epoch']}"
        if (training.run.folder / "best.safetensors").exists():
            place += ", best.safetensors"
        state += f": val {metric} {last[metric]:.2f} %, best {best[metric]:.2f} % ({place})"
    return f"{state}\n{training.run.folder.resolve()}"
