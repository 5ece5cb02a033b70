"""The lines about the plan of a run: learning rate, memory, exchange, disk, time, expected accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lars.config.config import Config
from lars.config.plan import Plan
from lars.expected import IMAGENET_CLASSES, IMAGENET_SIZE, Curve, curve_near, curves
from lars.learner.learner import Learner
from lars.learner.memory import memory_of
from lars.learner.trial import train_sizes
from lars.observe import lr_plot
from lars.run.disk import disk_space, in_units

if TYPE_CHECKING:
    from lars.observe.observer import Training

Line = tuple[str, str]


def plan_lines(training: Training, *, plot: bool) -> Iterator[Line]:
    """Yield rows of the summary. `plot`: whether to draw the learning rate large instead of in one line."""
    config, plan, learner = training.config, training.run.plan, training.learner
    yield "learning rate", learning_rate(config, plan)
    yield "", lr_plot.corners(learner.lr_at, plan)
    picture = lr_plot.plot if plot else lambda *args: [lr_plot.sparkline(*args)]
    for line in picture(learner.lr_at, plan):
        yield "", line
    yield "memory per rank", memory(learner, plan, training.source)
    yield "exchange", exchange(learner, plan, half=config.fp16_allreduce or config.bf16_allreduce)
    space = disk_space(training.run.folder, config, plan, learner)
    yield (
        "checkpoints",
        f"up to {in_units(space.checkpoint)} each, at most {space.count} at once; with the weights "
        f"{in_units(space.needed)}, {in_units(space.free)} free",
    )
    if config.images_per_second is not None:
        yield "time", time_needed(training, config.images_per_second)
    curve = expected_curve(config, plan, training.source)
    if curve is not None:
        yield "expected", expected(curve, config, plan)


def learning_rate(config: Config, plan: Plan) -> str:
    """The schedule of the learning rate."""
    if config.lr_schedule == "ramp":
        return f"ramp from {config.base_lr:g} to {plan.peak_lr:g}"
    if config.lr_schedule == "none":
        return f"{plan.peak_lr:g}, constant"
    return f"{plan.warmup_steps:g} steps of warm-up to {plan.peak_lr:g}, then {config.lr_schedule}"


def memory(learner: Learner, plan: Plan, source: Any) -> str:
    """The memory of a rank and its parts, for training images of the largest size."""
    side, views = max(size for _, size in train_sizes(source)), getattr(source, "views", 1)
    needed = memory_of(learner, (plan.batch_size * views, 3, side, side))
    parts = {
        "weights": needed.weights,
        "gradients": needed.gradients,
        "optimizer": needed.optimizer,
        "moving average": needed.average or None,
        "activations": needed.activations,
    }
    known = ", ".join(
        f"{name} {in_units(size)}" for name, size in parts.items() if size is not None
    )
    unknown = [
        name for name, size in (("optimizer", needed.optimizer), ("activations", needed.activations))
        if size is None
    ]  # fmt: skip
    note = f"; unknown: {', '.join(unknown)}" if unknown else ""
    return f"about {in_units(needed.total)} (estimate): {known}{note}"


def exchange(learner: Learner, plan: Plan, *, half: bool) -> str:
    """The bytes that the ranks exchange in a step. In a ring, each rank sends 2 (n - 1) / n times the gradients."""
    if plan.size == 1:
        return "none with a single rank"
    gradients = sum(
        p.numel() * (2 if half else p.element_size()) for p in learner.gradients.parameters
    )
    each = 2 * (plan.size - 1) / plan.size * gradients
    return (
        f"{in_units(gradients)} of gradients per step; each rank sends and receives {in_units(each)}"
        " (ring)"
    )


def time_needed(training: Training, images_per_second: float) -> str:
    """The time of an epoch and of the rest of the run. Validation is counted at the speed of training."""
    plan, first = training.run.plan, training.progress.step
    last = plan.last_step(training.config.max_steps)
    networks = 1 if training.config.ema_decay is None else 2  # the moving average is validated too
    validated = networks * sum(plan.validates(step) for step in range(first + 1, last + 1))
    epoch, images, validation = (
        duration(count / images_per_second)
        for count in (
            plan.samples_before(plan.steps_per_epoch),
            plan.samples_before(last)
            - plan.samples_before(first)
            + validated * training.source.val_size,
            validated * training.source.val_size,
        )
    )
    run = "rest of the run" if first else "run"
    return (
        f"{epoch} for an epoch, {images} for the {run} with {validation} of validation, at "
        f"{images_per_second:g} images/s"
    )


def duration(seconds: float) -> str:
    """A time for people: ``3 h 20 min``, ``4 min 5 s``, ``12 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def expected_curve(config: Config, plan: Plan, source: object) -> Curve | None:
    """The published runs with which this run is compared: those of --expected-curve, or those of its batch size."""
    if config.expected_curve is not None:
        return curves().get(config.expected_curve)
    comparable = (
        config.base_op == "lars"
        and config.model == "resnet50"
        and getattr(source, "num_classes", 0) == IMAGENET_CLASSES
        and abs(plan.train_size / IMAGENET_SIZE - 1) < 0.01
    )
    return curve_near(plan.effective_batch_size) if comparable else None


def expected(curve: Curve, config: Config, plan: Plan) -> str:
    """The published top-1 accuracies after a few epochs."""
    wanted = [epoch for epoch in (1, 2, 3, 5, 10, 20, 30, 50) if epoch <= config.epochs]
    found = (
        (epoch, curve.at(epoch, epoch * plan.steps_per_epoch, config.epochs)) for epoch in wanted
    )
    ranges = [
        f"epoch {epoch}: {r.low:.3g} to {r.high:.3g} %" for epoch, r in found if r is not None
    ]
    return f"val top-1 of {curve.runs} published runs ({curve.name}): {', '.join(ranges) or 'none'}"
