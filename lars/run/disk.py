"""The disk space that a run needs for its checkpoints and weights."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lars.config.config import Config
from lars.config.plan import Plan
from lars.errors import CheckpointError
from lars.learner.learner import Learner
from lars.learner.memory import bytes_of, optimizer_bytes, tensors_of
from lars.run.checkpoint import newest_first


@dataclass(frozen=True)
class DiskSpace:
    """What a run needs and what there is, in bytes.

    Attributes:
        checkpoint: The largest checkpoint.
        count: Checkpoints that exist at once: the newest ones, the best one, and the one being written.
        needed: All files of the run together, except for its small records.
        present: Those of them that already exist in the run folder.
        free: Free space on the file system of the run folder.
    """

    checkpoint: int
    count: int
    needed: int
    present: int
    free: int

    @property
    def missing(self) -> int:
        """How much free space is missing; 0 if there is enough."""
        return max(0, self.needed - self.present - self.free)


def disk_space(folder: Path, config: Config, plan: Plan, learner: Learner) -> DiskSpace:
    """Compare what the run needs with the free space.

    Args:
        folder: The run folder. It need not exist.
        config: The flags.
        plan: The plan of the run.
        learner: The learner, before or after its first step.
    """
    weights = bytes_of(tensors_of(learner.model))
    averaged = [] if learner.average is None else tensors_of(learner.average.module)
    # Within an epoch, a checkpoint holds the BatchNorm statistics of every rank as float64.
    statistics = 8 * plan.size * sum(buffer.numel() for buffer in learner.local_buffers())
    checkpoint = weights + (optimizer_bytes(learner.optimizer) or 0) + bytes_of(averaged)
    largest, count = checkpoint + statistics, config.keep_checkpoints + 2
    found = [path for _, path in newest_first(folder, config.checkpoint_format)]
    return DiskSpace(
        checkpoint=largest,
        count=count,
        # Old weights remain until the new ones are complete.
        needed=count * largest + 3 * weights,
        present=sum(_size(path) for path in [*found, *folder.glob("*.safetensors")]),
        free=shutil.disk_usage(existing_parent(folder)).free,
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # another job may delete it
        return 0


def existing_parent(folder: Path) -> Path:
    """The folder itself if it exists, or its nearest parent that does."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def refuse_unwritable(folder: Path) -> None:
    """Check that the run folder can be created or written, without writing anything.

    Raises:
        CheckpointError: It cannot.
    """
    parent = existing_parent(folder)
    if not parent.is_dir():
        cause = f"{parent} is not a folder"
    elif not os.access(parent, os.W_OK | os.X_OK):
        cause = f"{parent} does not permit it"
    else:
        return
    raise CheckpointError(
        f"--log-dir: {folder} cannot be written: {cause}; choose a writable folder"
    )


def space_warnings(folder: Path, space: DiskSpace) -> Iterator[str]:
    """Warn if the disk will become full during the run.

    Raises:
        CheckpointError: Not even one checkpoint fits.
    """
    if not space.missing:
        return
    free, one = in_units(space.free), in_units(space.checkpoint)
    if space.free < space.checkpoint and not space.present:
        raise CheckpointError(
            f"--log-dir: {folder} has {free} of free space, but a checkpoint takes {one}; free some space, or choose "
            "another --log-dir"
        )
    yield (
        f"--log-dir: {folder} has {free} of free space, but up to {space.count} checkpoints of {one} and the weights "
        f"need {in_units(space.missing)} more; free some space, choose another --log-dir, or lower --keep-checkpoints"
    )


def in_units(size: float) -> str:
    """A number of bytes for people: ``97.8 MiB``."""
    if size < 1024:
        return f"{size:.0f} bytes"
    units = ("KiB", "MiB", "GiB", "TiB")
    power = min(len(units), int(math.log(size, 1024)))
    value = size / 1024**power
    return f"{value:.0f} {units[power - 1]}" if value >= 100 else f"{value:.3g} {units[power - 1]}"
