"""The flags that describe the loss, and the mixing of training images."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lars.config.flags import flag, flag_name
from lars.errors import UsageError

LOSSES = ("ce", "bce")
_ONLY_BCE = ("bce_target_threshold", "bce_sum")


@dataclass(frozen=True)
class LossFlags:
    """The loss, its targets, and the mixing of the images of a micro-batch."""

    loss: str = flag(
        "ce",
        "ce: cross-entropy; bce: binary cross-entropy of every class, as in ResNet strikes back",
        group="loss",
        choices=LOSSES,
    )
    label_smoothing: float = flag(
        0.1,
        "label smoothing of torch.nn.CrossEntropyLoss, also for bce; the validation loss includes it",
        group="loss",
        at_least=0,
        below=1,
    )
    bce_target_threshold: float | None = flag(
        None,
        "bce: replace targets above this value by 1 and all others by 0, after mixing and label smoothing (default: "
        "keep the targets)",
        group="loss",
        above=0,
        below=1,
    )
    bce_sum: bool = flag(
        False,
        "bce: add the losses of all classes; by default their mean is taken, and gradients are smaller by the number "
        "of classes",
        group="loss",
    )
    mixup: float = flag(
        0.0,
        "mix every training image with its neighbour in the micro-batch; the share is drawn from Beta(X, X). With "
        "--cutmix, each micro-batch uses one of the two at random (0: off)",
        group="loss",
        at_least=0,
        below=1000,
    )
    cutmix: float = flag(
        0.0,
        "paste a box of its neighbour in the micro-batch into every training image; the area is drawn from Beta(X, X) "
        "(0: off)",
        group="loss",
        at_least=0,
        below=1000,
    )

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def check_loss_flags(self) -> None:
        """Check the flags of this class.

        Raises:
            UsageError: Two flags have no effect together.
        """
        threshold = self.bce_target_threshold
        if self.loss == "bce" and threshold is not None and threshold >= 1 - self.label_smoothing:
            raise UsageError(
                f"--bce-target-threshold {threshold:g} is not below 1 - --label-smoothing {self.label_smoothing:g}, so "
                "the target of every class would be 0; lower one of them"
            )


def refuse_without_bce(values: dict[str, Any], typed: Collection[str]) -> None:
    """Check the flags of bce on the command line itself. A recipe may have some although the command line sets ce.

    Args:
        values: Value of each field.
        typed: Fields whose flags were given on the command line.

    Raises:
        UsageError: A flag has no effect with this loss.
    """
    for name in _ONLY_BCE:
        if values["loss"] != "bce" and name in typed:
            raise UsageError(
                f"{flag_name(name)} has no effect with --loss {values['loss']}; add --loss bce, or leave it out"
            )


def refuse_single_images(flags: LossFlags, batch_size: int) -> None:
    """Check that a micro-batch has images to mix.

    Raises:
        UsageError: Every micro-batch has one image.
    """
    for name in ("mixup", "cutmix"):
        if batch_size == 1 and getattr(flags, name):
            raise UsageError(
                f"{flag_name(name)} mixes the images of a micro-batch, but --batch-size 1 leaves one; use a larger "
                "--batch-size"
            )
