"""Branching: starting a new run with different flags from a checkpoint of an existing run."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from lars.config.plan import Plan
from lars.errors import UsageError
from lars.run.progress import Progress
from lars.run.resume import LoadedCheckpoint

# The saved state depends on these fields, so a branch must not change them.
_FIXED = (
    "model", "freeze_backbone", "small_stem", "projector", "base_op", "sync_bn", "bn_bias_separately", "amp",
)  # fmt: skip


def refuse_unfit_branch(loaded: LoadedCheckpoint, changed: dict[str, tuple[Any, Any]]) -> None:
    """Refuse changes that do not fit the state in the checkpoint.

    Raises:
        UsageError: The model or the optimizer has changed.
    """
    for name in _FIXED:
        if name in changed:
            was, now = changed[name]
            raise UsageError(
                f"--branch: {loaded.path} was made with {name} = {was!r}, and its state does not fit {now!r}; "
                "a branch keeps the model and the optimizer"
            )


def group_options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The options of each parameter group: the arguments of the constructor, and the factor of the learning rate.

    Other entries are state and stay with the checkpoint, such as the step count of TVLARS.
    """
    options = {*inspect.signature(type(optimizer)).parameters, "lr_scale"} - {"params"}
    return [
        {name: value for name, value in group.items() if name in options}
        for group in optimizer.param_groups
    ]


def branched(loaded: LoadedCheckpoint, plan: Plan, changed: dict[str, tuple[Any, Any]]) -> Progress:
    """The progress with which a branch starts.

    Raises:
        UsageError: The checkpoint was saved within an epoch, whose rest would not fit the flags.
    """
    progress = Progress(**loaded.state["progress"])
    # A branch has no --init, and `progress.init` still describes the start of the run that it leaves.
    changed = {name: values for name, values in changed.items() if name != "init"}
    before = loaded.state["said"]["plan"]["steps_per_epoch"]
    batch = (loaded.state["same_run"]["effective_batch_size"], plan.effective_batch_size)
    if batch[0] != batch[1]:
        changed = changed | {"effective_batch_size": batch}
    epoch, rest = divmod(progress.step, before)
    needs_epoch = [
        name for name in ("effective_batch_size", "train_size", "ema_decay") if name in changed
    ]
    if rest and needs_epoch:
        raise UsageError(
            f"--branch: {loaded.path} was saved within an epoch ({rest} of {before} steps are done), so "
            f"{needs_epoch[0]} cannot change; branch from a checkpoint at the end of an epoch, or leave it as it was"
        )
    if before != plan.steps_per_epoch:
        progress.step = epoch * plan.steps_per_epoch
        for row in progress.history:
            row["step"] = row["epoch"] * plan.steps_per_epoch
        progress.reading = {}
    progress.branch = {
        "from": loaded.path,
        "step": progress.step,
        "changed": {name: list(values) for name, values in changed.items()},
    }
    return progress
