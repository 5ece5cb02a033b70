"""Choosing the checkpoint from which a job resumes, and checking that it fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lars.comm.state import broadcast_state
from lars.comm.world import World
from lars.config.config import Config
from lars.config.flags import flag_name
from lars.config.plan import Plan, make_plan
from lars.errors import CheckpointError, UsageError
from lars.run import checkpoint
from lars.run.records import Row, logged_rows

_START = "; to start a new run with its weights, use --init"
_PARTS = {"learner", "progress", "ranks", "same_run", "said"}


class LoadedCheckpoint(NamedTuple):
    """A checkpoint to resume from."""

    path: str
    state: dict[str, Any]
    is_branch: bool = False

    @property
    def ranks(self) -> int:
        """Number of ranks of the job that wrote the checkpoint."""
        return self.state["said"]["plan"]["size"]


def find_checkpoint(config: Config, folder: Path, world: World) -> LoadedCheckpoint | None:
    """Find the checkpoint that --resume or --branch selects. The root reads it and sends it to the other ranks.

    Raises:
        CheckpointError: There are checkpoints, but none can be used.
        UsageError: The run folder contains something that must not be overwritten.
    """
    found, path = _read_newest(config, folder) if world.is_root else (None, "")
    refusal = found if isinstance(found, Exception) else None
    refusal, path = world.broadcast_object((refusal, path), "checkpoint found")
    if refusal is not None:
        raise refusal
    state = broadcast_state(found, world)
    return None if state is None else LoadedCheckpoint(path, state, path == config.branch)


def _read_newest(config: Config, folder: Path) -> tuple[dict[str, Any] | Exception | None, str]:
    """The state to resume from and its path. The state is None to start from scratch, or an error to raise."""
    found = checkpoint.newest_first(folder, config.checkpoint_format)
    if config.resume == "never":
        taken = bool(found) or (folder / "metrics.jsonl").exists()
        message = f"--resume never: {folder} already holds a run; choose another --run-name, or remove the folder"
        return UsageError(message) if taken else None, str(folder)
    if config.branch is not None and Path(config.branch).resolve().parent == folder.resolve():
        return _branch_within(config, folder), str(folder)
    if not found:
        return _read_elsewhere(config, folder)
    if config.resume != "auto" and Path(config.resume).resolve() != found[0][1].resolve():
        print(
            f"--resume {config.resume} is ignored because {folder} has its own checkpoints; to start from that file "
            "again, move the checkpoints away, or choose another --run-name",
            flush=True,
        )
    for _, path in found:
        content = _read(path)
        if not isinstance(content, Exception):
            return _another_branch(config, folder, content) or content, str(path)
        print(f"warning: {path} cannot be used: {content}", flush=True)
    message = (
        f"--resume {config.resume}: none of the {len(found)} checkpoints in {folder} can be used; "
        "remove them to start from scratch, or start from another file with --resume PATH and another --run-name"
    )
    return CheckpointError(message), str(folder)


def _read_elsewhere(config: Config, folder: Path) -> tuple[dict[str, Any] | Exception | None, str]:
    """The same as `_read_newest` for a folder without checkpoints."""
    refusal = _other_format(config, folder)
    if refusal is not None:
        return refusal, str(folder)
    if config.branch is None and config.resume == "auto":
        return _results_without_checkpoint(folder, known=[]), str(folder)
    name, path = ("branch", config.branch) if config.branch else ("resume", config.resume)
    content = _read(Path(path))
    if isinstance(content, Exception):
        return CheckpointError(f"--{name} {path}: {content}{_what_it_is(Path(path))}"), path
    # A job that began from this file may have ended before it wrote a checkpoint. Its log holds the file's history.
    return _results_without_checkpoint(
        folder, known=content["progress"].get("history", [])
    ) or content, path


def _branch_within(config: Config, folder: Path) -> UsageError:
    return UsageError(
        f"--branch {config.branch}: the file lies in the run folder {folder} of this command, and a branch must not "
        "continue the run that it leaves; add another --run-name"
    )


def _another_branch(config: Config, folder: Path, state: dict[str, Any]) -> UsageError | None:
    """An error if --branch names another file than the one from which the run in the folder branched."""
    if config.branch is None:
        return None
    began = state["progress"].get("branch", {}).get("from")
    if began is not None and Path(began).resolve() == Path(config.branch).resolve():
        return None
    return UsageError(
        f"--branch {config.branch}: {folder} has checkpoints of another run; choose another --run-name for the branch"
    )


def _what_it_is(path: Path) -> str:
    """A hint about a file that is not a checkpoint of this trainer."""
    if path.suffix == ".safetensors":
        return (
            f"; it holds only weights, but a run resumes from a file checkpoint-*.pth.tar{_START}"
        )
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # the unpickler of torch.load raises many types
        return ""
    if isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values()):
        return (
            f"; it holds only weights, but a run resumes from a checkpoint of this trainer{_START}"
        )
    return f"; it was written by another program{_START}"


def _other_format(config: Config, folder: Path) -> UsageError | None:
    """An error if the folder holds checkpoints whose names do not match --checkpoint-format."""
    try:
        theirs = json.loads((folder / "config.json").read_bytes())["flags"]["checkpoint_format"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not checkpoint.newest_first(folder, theirs):
        return None
    return UsageError(
        f"--checkpoint-format {config.checkpoint_format}: the checkpoints in {folder} are named {theirs}; use "
        "that format, or choose another --run-name"
    )


def _results_without_checkpoint(folder: Path, *, known: list[Row]) -> UsageError | None:
    """An error if the folder holds results that a new run would overwrite."""
    epochs = {row["epoch"] for row in known}
    rows = [row for row in logged_rows(folder / "metrics.jsonl") if row["epoch"] not in epochs]
    if not rows:
        return None
    return UsageError(
        f"--run-name: {folder} holds the results of {rows[-1].get('epoch')} epochs but no checkpoint; "
        "choose another name, or remove the folder to train again"
    )


def _read(path: Path) -> dict[str, Any] | Exception:
    try:
        state = checkpoint.load(path)
        if not state.keys() >= _PARTS:
            raise CheckpointError("not a checkpoint of this trainer")
    except CheckpointError as error:
        return error
    return state


def changes(
    loaded: LoadedCheckpoint, mine: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The differences between a checkpoint's run and this run: name -> (value there, value here).

    Args:
        loaded: The checkpoint.
        mine: The identity of this run; see `lars.run.identity.same_run`.
        defaults: Values of flags that the checkpoint lacks because it is older than they are.
    """
    theirs = defaults | loaded.state["same_run"]
    return {
        name: (theirs.get(name), value) for name, value in mine.items() if theirs.get(name) != value
    }


def refuse_another_run(loaded: LoadedCheckpoint, changed: dict[str, tuple[Any, Any]]) -> None:
    """Refuse a checkpoint of another run; `changed` is the result of `changes`.

    Raises:
        UsageError: Something has changed.
    """
    if changed:
        differences = "; ".join(
            f"{n} was {was!r} and is {now!r}" for n, (was, now) in changed.items()
        )
        raise UsageError(
            f"--resume: {loaded.path} belongs to another run: {differences}. "
            f"Use the same flags, start a new run with another --run-name, or continue with the new flags by adding: "
            f"--branch {loaded.path} --run-name NAME"
        )


def same_effective_batch(config: Config, plan: Plan, loaded: LoadedCheckpoint) -> Plan:
    """Adjust the accumulation so that a resumed run keeps its effective batch size on a different number of ranks.

    Raises:
        UsageError: The flags change the effective batch size, or these ranks cannot form it.
    """
    there = loaded.state["same_run"]["effective_batch_size"]
    if there == plan.effective_batch_size:
        return plan
    for name in ("effective_batch_size", "batches_per_allreduce"):
        before, value = loaded.state["said"]["flags"][name], getattr(config, name)
        if value != before:
            raise UsageError(
                f"{flag_name(name)} {value}: {loaded.path} was made with {before}, in steps of {there} samples, but "
                f"steps would now have {plan.effective_batch_size}; use the same value, or another --run-name"
            )
    micro_batches = there // plan.batch_size
    if micro_batches % plan.size:
        fit = ", ".join(
            str(size) for size in range(1, micro_batches + 1) if micro_batches % size == 0
        )
        raise UsageError(
            f"--resume: {loaded.path} was made in steps of {there} samples, which {plan.size} ranks with --batch-size "
            f"{plan.batch_size} cannot form; use one of these numbers of ranks: {fit}"
        )
    config = replace(config, effective_batch_size=there, batches_per_allreduce=1)
    return make_plan(config, size=plan.size, train_size=plan.train_size)
