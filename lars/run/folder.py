"""A run and its folder. The root writes the files, and all ranks resume from them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lars.comm.world import World
from lars.config.config import Config
from lars.config.plan import Plan, make_plan
from lars.errors import CheckpointError
from lars.learner.device import return_freed_memory
from lars.learner.learner import Learner
from lars.run import checkpoint, initial
from lars.run.branch import branched, group_options, refuse_unfit_branch
from lars.run.export import export_weights
from lars.run.files import atomic_write, report
from lars.run.identity import as_dict, defaults, flag_defaults, run_folder, same_run, versions
from lars.run.lock import LOCK_SECONDS, locked
from lars.run.progress import Progress
from lars.run.records import Row, logged_rows
from lars.run.resume import (
    LoadedCheckpoint,
    changes,
    find_checkpoint,
    refuse_another_run,
    same_effective_batch,
)

# The job ends after this many consecutive checkpoints that could not be written.
FAILED_WRITES = 3


class Run:
    """One run, from its first job to its last.

    Attributes:
        folder: The folder to which the run writes all its files.
        plan: The arithmetic of the run on these ranks.
    """

    def __init__(self, config: Config, source: Any, world: World) -> None:
        """Describe the run. Nothing is written yet.

        Raises:
            UsageError: The flags do not fit the number of ranks or the data set.
        """
        self.config, self.source, self.world = config, source, world
        self.folder = run_folder(config)
        self.plan: Plan = make_plan(config, size=world.size, train_size=source.train_size)
        self.identity, self.versions = same_run(config, source), versions(source)
        self.class_names = list(source.class_names)
        self.failed_writes = 0
        self.starts_new = True
        self.initial: dict[str, Any] = {}

    def locked(self, while_waiting: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """Keep other jobs out of the folder during a block; see `lars.run.lock.locked`."""
        if self.world.is_root:
            # The other ranks wait for this one, and their watchdogs must not end the job meanwhile.
            stall = self.config.stall_seconds
            return locked(self.folder, while_waiting, min(LOCK_SECONDS, stall or LOCK_SECONDS))
        return contextlib.nullcontext()

    def find_checkpoint(self) -> LoadedCheckpoint | None:
        """Find the checkpoint to resume from, and adapt `plan` to its effective batch size.

        Raises:
            CheckpointError: There are checkpoints, but none can be used.
            UsageError: The checkpoint does not belong to this run.
        """
        loaded = find_checkpoint(self.config, self.folder, self.world)
        self.starts_new = loaded is None
        content = initial.identity(self.config, loaded) if self.world.is_root else None
        self.identity["init"] = self.world.broadcast_object(content, "identity of --init")
        if loaded is None:
            return None
        if loaded.is_branch:
            refuse_unfit_branch(loaded, self._changes(loaded))
        else:
            refuse_another_run(loaded, self._changes(loaded))
            self.plan = same_effective_batch(self.config, self.plan, loaded)
        return loaded

    def _changes(self, loaded: LoadedCheckpoint) -> dict[str, tuple[Any, Any]]:
        """What differs between the run of a checkpoint and this one."""
        return changes(loaded, self.identity, defaults(self.config, self.source))

    def initialise(self, model: nn.Module) -> None:
        """Load the weights of --init into the network of a new run. Its ranks then differ until they get the root's.

        Raises:
            CheckpointError: The file cannot be read.
            UsageError: The weights do not fit.
        """
        if self.starts_new and self.config.init is not None:
            classes = self.source.num_classes
            self.initial = initial.load(self.config, model, classes, self.world)

    def restore(self, loaded: LoadedCheckpoint | None, learner: Learner) -> Progress:
        """Load a checkpoint into the learner, the same bytes on every rank. Without one, start at step 0."""
        progress = self.progress_of(loaded, learner)
        if loaded is None:
            return progress
        options = group_options(learner.optimizer)
        learner.load_state_dict(loaded.state.pop("learner"))
        return_freed_memory()
        if loaded.is_branch:
            for group, fresh in zip(learner.optimizer.param_groups, options, strict=True):
                group.update(fresh)
        if loaded.state["ranks"] is not None:
            self._restore_rank(loaded.state["ranks"], learner)
        if self.lacks_validation(progress):
            # The epoch was saved before its validation. If the validation was complete, its rows are in metrics.jsonl.
            splits = set(learner.networks())
            rows = self._logged_validation(progress.step, splits) if self.world.is_root else []
            progress.history += self.world.broadcast_object(rows, "validation rows")
        self.export_best(learner, progress)  # the last job may have ended before it did this
        return progress

    def progress_of(self, loaded: LoadedCheckpoint | None, learner: Learner) -> Progress:
        """The progress with which this job starts. The learner does not change."""
        if loaded is None:
            return replace(Progress.starting(learner.metrics.totals), init=self.initial)
        if loaded.is_branch:
            return branched(loaded, self.plan, self._changes(loaded))
        return Progress(**loaded.state["progress"])

    def lacks_validation(self, progress: Progress) -> bool:
        """Whether the current step should have been validated but has not been."""
        last = progress.last("val")
        return self.plan.validates(progress.step) and (last is None or last["step"] < progress.step)

    def _logged_validation(self, step: int, splits: set[str]) -> list[Row]:
        """The rows of the validation after a step in metrics.jsonl. Empty if the validation was not completed."""
        rows = [r for r in logged_rows(self.folder / "metrics.jsonl") if r["step"] == step]
        rows = [row for row in rows if row["split"] in splits]
        return rows if {row["split"] for row in rows} == splits else []

    def _restore_rank(self, ranks: Tensor, learner: Learner) -> None:
        """Restore the state that differs between the ranks; see `_rank_state`."""
        sums = len(learner.metrics.totals)
        if len(ranks) == self.world.size:
            mine = ranks[self.world.rank]
        else:  # the number of ranks has changed: the root gets all sums, and every rank the mean statistics
            mine = ranks.mean(0)
            mine[:sums] = ranks[:, :sums].sum(0) if self.world.is_root else 0
        learner.metrics.totals.copy_(mine[:sums])
        tensors = learner.local_buffers()
        parts = mine[sums:].split([t.numel() for t in tensors])
        for tensor, values in zip(tensors, parts, strict=True):
            tensor.copy_(values.view_as(tensor))

    def description(self, progress: Progress) -> dict[str, Any]:
        """The content of config.json: flags and their defaults, plan, versions, branch point and class names."""
        return {
            "flags": as_dict(self.config, self.source),
            "defaults": flag_defaults(self.config, self.source),
            "plan": asdict(self.plan),
            "versions": self.versions,
            "branch": progress.branch,
            "init": progress.init,
            "classes": self.class_names,
        }

    def save(self, learner: Learner, progress: Progress, *, last: bool) -> None:
        """Write a checkpoint, and delete old ones. All ranks must call this.

        A failed write leaves the older checkpoints unchanged, and training continues. The job ends if the `last`
        checkpoint of the job cannot be written, or after several failed writes in a row.

        Raises:
            CheckpointError: The last checkpoint, or several in a row, could not be written.
        """
        epochs, step = divmod(progress.step, self.plan.steps_per_epoch)
        progress.window = learner.metrics.totals.to("cpu", copy=True)
        # Within an epoch every rank has its own sums and BatchNorm statistics. At the end of an epoch they are equal.
        ranks = None
        if step:
            ranks = self.world.all_gather(_rank_state(learner), "rank state")
        if not self.world.is_root:
            return
        state = {
            "learner": learner.state_dict(),
            "progress": {f.name: getattr(progress, f.name) for f in fields(progress)},
            "ranks": ranks,
            "same_run": self.identity | {"effective_batch_size": self.plan.effective_batch_size},
            "said": self.description(progress),
        }
        best = progress.best(learner.task.best)
        try:
            self._write(state, (epochs, step), keep_also=[(best["epoch"], 0)] if best else [])
        except OSError as error:
            self.failed_writes += 1
            message = (
                f"the checkpoint of step {progress.step} could not be written to {self.folder}"
            )
            if last or self.failed_writes == FAILED_WRITES:
                raise CheckpointError(
                    f"{message} ({self.failed_writes} in a row): {error}; older checkpoints are unchanged: "
                    "free some space, and run the same command again"
                ) from error
            report(f"warning: {message}: {error}; training continues")
        else:
            self.failed_writes = 0

    def _write(
        self, state: dict[str, Any], place: tuple[int, int], *, keep_also: list[tuple[int, int]]
    ) -> None:
        file_format, keep = self.config.checkpoint_format, self.config.keep_checkpoints
        epochs, step = place
        name = file_format.replace("{epoch}", f"{epochs}+{step}" if step else f"{epochs}")
        checkpoint.save(self.folder / name, state)
        checkpoint.rotate(self.folder, file_format, newest=place, keep=keep, keep_also=keep_also)

    def validated(self, learner: Learner, progress: Progress, val_loader: Any) -> None:
        """List what the validation could not read, and write best.safetensors if it was the best one so far."""
        self.collect_bad_images(progress, val_loader)
        self.export_best(learner, progress)

    def export(self, learner: Learner, progress: Progress) -> None:
        """Write model.safetensors: the final weights or their moving average, whichever validated better.

        Raises:
            CheckpointError: The file cannot be written.
        """
        metric = learner.task.best
        rows = [progress.last(split) for split in learner.networks()]
        best = max((row for row in rows if row), key=lambda row: row[metric], default=None)
        try:
            self._export("model.safetensors", learner, best)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / 'model.safetensors'} could not be written: {error}; the training is complete and its "
                "checkpoint is safe: free some space, and run the same command again"
            ) from error

    def export_best(self, learner: Learner, progress: Progress) -> None:
        """Write best.safetensors if the last validation is the best one so far. A failed write causes a warning."""
        best = progress.best(learner.task.best)
        if best is None or best["step"] != progress.step or best["split"] not in learner.networks():
            return
        try:
            self._export("best.safetensors", learner, best)
        except OSError as error:
            path = self.folder / "best.safetensors"
            place = f"the checkpoint of epoch {best['epoch']} holds these weights"
            report(f"warning: {path} could not be written: {error}; {place}")

    def _export(self, name: str, learner: Learner, row: Row | None) -> None:
        if self.world.is_root:
            networks = learner.networks()
            model = networks[row["split"]] if row else list(networks.values())[-1]
            with learner.evaluating():
                export_weights(self.folder / name, model, row, self.class_names)

    def record(self, name: str, value: Any) -> None:
        """Write `value` as the JSON file `name` in the run folder. A full disk only causes a warning."""
        try:
            with atomic_write(self.folder / name) as file:
                file.write((json.dumps(value, indent=2) + "\n").encode())
        except OSError as error:
            report(f"warning: {self.folder / name} could not be written: {error}")

    def collect_bad_images(self, progress: Progress, *loaders: Any) -> None:
        """Gather the unreadable images of all ranks, and list them in bad_images.json."""
        mine = [message for loader in loaders for message in loader.bad_images]
        gathered = self.world.all_gather_object(mine, "bad images")
        progress.bad_images = sorted(set(progress.bad_images).union(*gathered))
        # The file is written every time, because it is missing after a branch or after a full disk.
        if progress.bad_images and self.world.is_root:
            self.record("bad_images.json", progress.bad_images)


def _rank_state(learner: Learner) -> Tensor:
    """The state that differs between the ranks within an epoch: metric sums and BatchNorm statistics.

    It is one float64 vector, because float64 represents float32 values and counts exactly.
    """
    tensors = [learner.metrics.totals, *learner.local_buffers()]
    return torch.cat([t.detach().double().flatten().cpu() for t in tensors])
