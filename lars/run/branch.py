"""Branching: starting a new run with different flags from a checkpoint of an existing run."""

from __future__ import annotations

from typing import Any

from lars.config.plan import Plan
from lars.errors import UsageError
from lars.run.progress import Progress
from lars.run.resume import LoadedCheckpoint

# The saved state depends on these fields, so a branch must not change them.
_FIXED = ("model", "base_op", "sync_bn")


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


def branched(loaded: LoadedCheckpoint, plan: Plan, changed: dict[str, tuple[Any, Any]]) -> Progress:
    """The progress with which a branch starts.

    Raises:
        UsageError: The number of steps per epoch has changed, and the checkpoint was saved within an epoch.
    """
    progress = Progress(**loaded.state["progress"])
    before = loaded.state["said"]["plan"]["steps_per_epoch"]
    batch = (loaded.state["same_run"]["effective_batch_size"], plan.effective_batch_size)
    if batch[0] != batch[1]:
        changed = changed | {"effective_batch_size": batch}
    if before != plan.steps_per_epoch:
        epoch, rest = divmod(progress.step, before)
        if rest:
            raise UsageError(
                f"--branch: {loaded.path} was saved within an epoch ({rest} of {before} steps are done), but an epoch "
                f"now has {plan.steps_per_epoch} steps; branch from a checkpoint at the end of an epoch, or keep the "
                "effective batch size"
            )
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
