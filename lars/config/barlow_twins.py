"""The flags of Barlow Twins: pretraining without labels, and the evaluation of the backbone by a linear classifier.

The module imports little, so that ``--help`` and flag errors appear at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from lars import launcher
from lars.config.config import Config
from lars.config.flags import check_ranges, flag, flag_name
from lars.errors import UsageError

GROUP = "Barlow Twins"
STAGES = ("both", "pretraining", "linear", "untrained")
# Samples per micro-batch of the linear evaluation. It changes no result, because the backbone is frozen.
LINEAR_MICRO_BATCH = 32


def _usual(name: str, value: Any, aliases: tuple[str, ...] = ()) -> Any:
    """A flag of `Config` with another default."""
    known = next(f.metadata for f in fields(Config) if f.name == name)
    text = re.sub(r" \(default: [^)]*\)", "", known["help"])
    more = {"help": text, "aliases": (*known["aliases"], *aliases)}
    return field(default=value, metadata={**known, **more})


@dataclass(frozen=True)
class BarlowTwinsConfig(Config):
    """All settings of the pretraining that do not depend on the source of the images."""

    task: ClassVar[str] = "lars.learner.barlow_twins:pretraining"

    projector: str = flag(
        "4096-4096-4096", "widths of the projector's linear layers, joined by hyphens", group=GROUP
    )
    btlmbda: float = flag(
        0.005,
        "weight of the off-diagonal elements of the cross-correlation in the loss",
        group=GROUP,
        at_least=0,
        aliases=("--lambda",),
    )
    lr_biases: float = flag(
        0.0048,
        "learning rate of biases and normalisation layers, which follows the schedule of --base-lr",
        group=GROUP,
        at_least=0,
    )
    # The paper's recipe at a batch size of 256. There both rates are multiplied by batch size / 256.
    epochs: int = _usual("epochs", 1000, ("--cl-epochs",))
    batch_size: int = _usual("batch_size", 256)
    base_op: str = _usual("base_op", "lars")
    lars_form: str = _usual("lars_form", "barlowtwins")
    base_lr: float = _usual("base_lr", 0.2)
    wd: float = _usual("wd", 1.5e-6)
    warmup_epochs: float = _usual("warmup_epochs", 10.0)
    lr_schedule: str = _usual("lr_schedule", "cosine")
    label_smoothing: float = _usual("label_smoothing", 0.0)
    sync_bn: bool = _usual("sync_bn", True)

    def __post_init__(self) -> None:
        """Check the values that do not depend on the number of ranks.

        Raises:
            UsageError: A value is out of range, or two flags contradict each other.
        """
        super().__post_init__()
        if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", self.projector):
            raise UsageError(
                f"--projector {self.projector} must be widths that are joined by hyphens, such as 4096-4096-4096"
            )
        if not self.sync_bn:
            raise UsageError(
                "--no-sync-bn: Barlow Twins computes its statistics over all ranks; leave the flag out"
            )
        for name in ("loss", "mixup", "cutmix"):
            if getattr(self, name) != getattr(Config, name):
                raise UsageError(
                    f"{flag_name(name)} has no effect with Barlow Twins, which has its own loss; leave it out"
                )
        if self.freeze_backbone:
            raise UsageError(
                "--freeze-backbone: Barlow Twins trains the backbone; leave the flag out"
            )
        if self.benchmark == "noise":
            raise UsageError("--benchmark noise has no second view; use --benchmark data")

    @property
    def projector_sizes(self) -> tuple[int, ...]:
        """The widths of the projector's linear layers."""
        return tuple(map(int, self.projector.split("-")))

    @property
    def only_looks(self) -> bool:
        """Whether another flag replaces the training, so that no evaluation follows it."""
        return bool(self.benchmark or self.evaluate or self.dry_run)

    @property
    def identity(self) -> str:
        """A hash of the flags on which the trained weights depend. A flag with its default value does not change it."""
        changed = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if (f.metadata["same_run"] or f.name == "max_steps")
            and f.name != "effective_batch_size"  # the run itself checks it
            and getattr(self, f.name) != f.default
        }
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class LinearFlags:
    """The stages of the experiment, and the linear evaluation."""

    stage: str = flag(
        "both",
        "what to run: both stages, only the pretraining, only the linear evaluation of an earlier pretraining with the "
        "same flags, or the linear evaluation of an untrained backbone for comparison",
        group=GROUP,
        choices=STAGES,
    )
    linear_epochs: int = flag(100, "epochs of the linear evaluation", group=GROUP, at_least=1)
    linear_batch_size: int = flag(
        256, "samples per step of the linear evaluation, over all ranks", group=GROUP, at_least=1
    )
    lr_classifier: float = flag(
        0.3,
        "learning rate of the classifier at the start of its cosine decay",
        group=GROUP,
        above=0,
    )
    lr_backbone: float = flag(
        0.0,
        "learning rate of the backbone in the linear evaluation; 0 freezes it, and more fine-tunes it",
        group=GROUP,
        at_least=0,
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: A value is out of range, or the ranks cannot form a step.
        """
        check_ranges(self)
        micro, ranks = self.micro_batch, launcher.tasks()[0]
        if self.linear_batch_size % (micro * ranks):
            raise UsageError(
                f"--linear-batch-size {self.linear_batch_size} is not a multiple of {micro} samples x {ranks} ranks; "
                f"use a multiple of {micro * ranks}"
            )

    @property
    def micro_batch(self) -> int:
        """Samples per micro-batch."""
        return min(LINEAR_MICRO_BATCH, self.linear_batch_size)


@dataclass(frozen=True)
class LinearConfig(Config):
    """All settings of the linear evaluation that do not depend on the source of the images.

    Attributes:
        backbone: Path of the weights of a pretraining. Empty: the backbone keeps its initial weights.
        pretraining: Identifies the pretraining, so that a linear evaluation does not resume with another backbone.
        lr_backbone: Learning rate of the backbone. 0: it is frozen.
    """

    task: ClassVar[str] = "lars.learner.barlow_twins:linear_evaluation"

    backbone: str = flag("", "weights of a pretraining", group=GROUP, same_run=False)
    pretraining: str = flag("", "identity of the pretraining", group=GROUP)
    lr_backbone: float = flag(0.0, "learning rate of the backbone", group=GROUP)

    @property
    def frozen(self) -> bool:
        """Whether the backbone keeps its values."""
        return self.lr_backbone == 0


def linear_config(
    config: BarlowTwinsConfig, flags: LinearFlags, *, run_name: str, backbone: str
) -> LinearConfig:
    """The settings of the linear evaluation that follows a pretraining.

    Flags about the network, the run folder, the plan and the machine are those of the pretraining. The optimizer is SGD
    with momentum 0.9, weight decay 1e-6 and cosine decay per step, as in the paper (appendix A).

    Args:
        config: The flags of the pretraining.
        flags: The flags of the linear evaluation.
        run_name: Name of the run folder.
        backbone: See `LinearConfig`.
    """
    kept = {
        f.name: getattr(config, f.name)
        for f in fields(Config)
        if f.metadata["group"] in ("model", "run", "plan", "machine")
    }
    own = {
        "base_op": "sgd",
        "momentum": 0.9,
        "wd": 1e-6,
        "base_lr": flags.lr_classifier,
        "lr_backbone": flags.lr_backbone,
        "lr_schedule": "cosine",
        "warmup_epochs": 0.0,
        "epochs": flags.linear_epochs,
        "batch_size": flags.micro_batch,
        "effective_batch_size": flags.linear_batch_size,
        "val_batch_size": config.val_batch_size,
        "label_smoothing": config.label_smoothing,
        "sync_bn": flags.lr_backbone > 0,
        "resume": "auto",
        "branch": None,
        "init": None,
        "max_steps": config.max_steps if config.benchmark else None,
        "run_name": run_name,
    }
    pretraining = config.identity if backbone else ""
    return LinearConfig(**(kept | own), backbone=backbone, pretraining=pretraining)
