"""A run on the disk: its folder, how far it has come, and how it goes on after an interruption."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lars import checkpoint
from lars.checkpoint import CheckpointError
from lars.comm import World
from lars.config import Config, UsageError, as_dict, identity
from lars.logs import Row, RunLog, Silence
from lars.plan import Plan


@dataclass
class Progress:
    """How far a run has come: all that a checkpoint holds beside the model and the optimizer.

    Attributes:
        step: Optimizer steps taken.
        history: Rows of metrics.jsonl.
        totals: Sums of `lars.metrics.Sums` over all ranks for the part of the unfinished epoch that has been logged.
        window: This rank's sums since then.
        seconds: Time spent in the unfinished epoch.
    """

    step: int = 0
    history: list[Row] = field(default_factory=list)
    totals: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    window: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    seconds: float = 0.0

    def best(self) -> Row | None:
        """The validation row with the highest top-1, the earliest of equals."""
        rows = [row for row in self.history if row["split"] == "val"]
        return max(rows, key=lambda row: row["top1"], default=None)


class Run:
    """A run folder: the root writes into it, and all ranks go on from what it holds."""

    def __init__(self, config: Config, source: Any, plan: Plan, world: World) -> None:
        """Name the folder; nothing is written before `open`."""
        self.config, self.plan, self.world = config, plan, world
        self.folder = Path(config.log_dir) / (config.run_name or run_name(config, plan))
        self.said = {"flags": as_dict(config, source), "plan": asdict(plan), "versions": versions()}
        self.same_run = identity(config, source) | {
            "effective_batch_size": plan.effective_batch_size,
            "train_size": plan.train_size,
        }

    def open(self, progress: Progress) -> Silence:
        """Make the folder and its log, on the root; the log begins with `progress` and nothing beyond it."""
        if not self.world.is_root:
            return Silence()
        log = RunLog(self.folder)
        log.record("config.json", self.said)
        log.restart(progress.history, step=progress.step)
        return log

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Load what --resume asks for, on every rank from the same bytes.

        Raises:
            CheckpointError: There are checkpoints, but none that can be used.
            UsageError: The checkpoint belongs to another run, or the folder is taken.
        """
        found = self._find() if self.world.is_root else None
        content, path = self.world.from_root(found, "checkpoint")
        if isinstance(content, Exception):
            raise content
        if content is None:
            return Progress()
        state = checkpoint.loads(content)
        self._refuse_another_run(state["same_run"], path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return self._rank_state(state, model)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write a checkpoint (all ranks must call); keep the newest ones and the best."""
        epochs, step = divmod(progress.step, self.plan.steps_per_epoch)
        # Within an epoch every rank has BatchNorm statistics and sums of its own; at its end they are one.
        buffers = _flat_buffers(model)
        ranks = (
            self.world.gather(torch.cat([progress.window, buffers]), "rank state") if step else None
        )
        if not self.world.is_root:
            return
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": progress.step,
            "history": progress.history,
            "totals": progress.totals,
            "seconds": progress.seconds,
            "ranks": ranks,
            "same_run": self.same_run,
            "said": self.said,
        }
        name = f"{epochs}+{step}" if step else f"{epochs}"
        checkpoint.save(self.folder / self.config.checkpoint_format.replace("{epoch}", name), state)
        best = progress.best()
        checkpoint.rotate(
            self.folder,
            self.config.checkpoint_format,
            keep=self.config.keep_checkpoints,
            spared=[(best["epoch"], 0)] if best else [],
        )

    def _rank_state(self, state: dict[str, Any], model: nn.Module) -> Progress:
        progress = Progress(
            step=state["step"],
            history=state["history"],
            totals=state["totals"],
            seconds=state["seconds"],
        )
        ranks: Tensor | None = state["ranks"]
        if ranks is not None:
            if len(ranks) == self.world.size:
                mine = ranks[self.world.rank]
            else:  # another number of ranks: one rank takes the sums, all take the average statistics
                mine = ranks.mean(0)
                mine[:4] = ranks[:, :4].sum(0) if self.world.is_root else 0
            progress.window = mine[:4].clone()
            _load_buffers(model, mine[4:])
        return progress

    def _refuse_another_run(self, theirs: dict[str, Any], path: str) -> None:
        changed = [
            f"{name} was {theirs.get(name)!r} and is {value!r}"
            for name, value in self.same_run.items()
            if theirs.get(name) != value
        ]
        if changed:
            raise UsageError(
                f"--resume: {path} belongs to another run: {'; '.join(changed)}. "
                "Give the same flags, or another --run-name, or --resume never with another --log-dir"
            )

    def _find(self) -> tuple[bytes | Exception | None, str]:
        """The bytes of the checkpoint to go on from (None: start afresh; errors are for all ranks), and its path."""
        config = self.config
        if config.resume not in ("auto", "never"):
            content = _read(Path(config.resume))
            if isinstance(content, Exception):
                content = CheckpointError(f"--resume {config.resume}: {content}")
            return content, config.resume
        found = checkpoint.newest_first(self.folder, config.checkpoint_format)
        if config.resume == "never":
            taken = bool(found) or (self.folder / "metrics.jsonl").exists()
            message = f"--resume never: {self.folder} already holds a run; give another --run-name, or remove it"
            return UsageError(message) if taken else None, str(self.folder)
        for _, path in found:
            content = _read(path)
            if not isinstance(content, Exception):
                return content, str(path)
            print(
                f"warning: {path} cannot be used: {content}; trying the one before it", flush=True
            )
        message = (
            f"--resume auto: none of the {len(found)} checkpoints in {self.folder} can be used; "
            "remove them to start afresh, or give --resume PATH"
        )
        return CheckpointError(message) if found else None, str(self.folder)


def run_name(config: Config, plan: Plan) -> str:
    """A folder name made of what is run: the same command finds it again, whatever the number of ranks."""
    return (
        f"{config.model}_{config.base_op}_ebs{plan.effective_batch_size}_lr{plan.peak_lr:g}"
        f"_wd{config.wd:g}_ep{config.epochs}_seed{config.seed}"
    )


def versions() -> dict[str, str]:
    """Of what computes."""
    return {"python": platform.python_version(), "torch": str(torch.__version__)}


def _read(path: Path) -> bytes | Exception:
    try:
        content = path.read_bytes()
        checkpoint.loads(content)
    except (OSError, CheckpointError) as error:
        return error
    return content


def _flat_buffers(model: nn.Module) -> Tensor:
    """All buffers in one float64 vector, which holds float32 values and counts exactly."""
    parts = [b.detach().double().flatten().cpu() for b in model.buffers()]
    return torch.cat([torch.empty(0, dtype=torch.float64), *parts])


def _load_buffers(model: nn.Module, flat: Tensor) -> None:
    buffers = list(model.buffers())
    for buffer, values in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(values.view_as(buffer))
