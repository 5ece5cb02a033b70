"""A run on the disk: its folder, how far it has come, and how it goes on after an interruption."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lars import checkpoint
from lars.checkpoint import CheckpointError
from lars.comm import World
from lars.config import Config, UsageError, as_dict, identity
from lars.learner import Learner
from lars.logs import Row, RunLog, Silence
from lars.plan import Plan

# Checkpoints in a row that may fail to be written before the job ends.
FAILED_WRITES = 3

# How long another job in the folder is waited for: NFS frees the locks of a host that died after 90 s.
_LOCK_SECONDS = 120.0

_PARTS = {"learner", "progress", "ranks", "same_run", "said"}


@dataclass
class Progress:
    """How far a run has come: all that a checkpoint holds beside the model and the optimizer.

    Attributes:
        step: Optimizer steps taken.
        history: Rows of metrics.jsonl.
        totals: Sums of `lars.metrics.Sums` over all ranks for the part of the unfinished epoch that has been logged.
        window: This rank's sums since then.
        seconds: Time spent in the unfinished epoch.
        skipped: Steps that were not taken because something in them was not finite.
        skipped_in_a_row: The last of them.
        bad_images: What has been said of the images that cannot be read, on any rank.
    """

    step: int = 0
    history: list[Row] = field(default_factory=list)
    totals: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    window: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    bad_images: list[str] = field(default_factory=list)

    def best(self) -> Row | None:
        """The validation row with the highest top-1, the earliest of equals."""
        rows = [row for row in self.history if row["split"] == "val"]
        return max(rows, key=lambda row: row["top1"], default=None)


class Run:
    """A run folder: the root writes into it, and all ranks go on from what it holds."""

    def __init__(self, config: Config, source: Any, plan: Plan, world: World, folder: Path) -> None:
        """Describe the run; nothing is written before `open`."""
        self.config, self.plan, self.world, self.folder = config, plan, world, folder
        self.said = {
            "flags": as_dict(config, source),
            "plan": asdict(plan),
            "versions": versions(source),
        }
        self.failed_writes = 0
        self.same_run = same_run(config, source) | {
            "effective_batch_size": plan.effective_batch_size
        }

    def open(self, progress: Progress) -> Silence:
        """Begin the log, on the root, with `progress` and nothing beyond it.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        if not self.world.is_root:
            return Silence()
        log = RunLog(self.folder)
        log.record("config.json", self.said)
        try:
            log.restart(progress.history, step=progress.step)
        except OSError as error:
            raise CheckpointError(f"--log-dir: {self.folder} cannot be written: {error}") from error
        return log

    def resume(self, found: Found | None, learner: Learner) -> Progress:
        """Go on from a checkpoint, on every rank from the same bytes; from the beginning if there is none."""
        if found is None:
            return Progress()
        learner.load_state_dict(found.state["learner"])
        progress = Progress(**found.state["progress"])
        if found.state["ranks"] is not None:
            self._load_rank(found.state["ranks"], learner, progress)
        return progress

    def save(self, learner: Learner, progress: Progress, *, last: bool) -> None:
        """Write a checkpoint (all ranks must call); keep the newest ones and the best.

        A write that fails leaves the older checkpoints as they are, and training goes on, for a few times; but not
        after the `last` one before the job ends.

        Raises:
            CheckpointError: The last one, or several in a row, could not be written.
        """
        epochs, step = divmod(progress.step, self.plan.steps_per_epoch)
        # Within an epoch every rank has BatchNorm statistics and sums of its own; at its end they are one.
        ranks = None
        if step:
            mine = torch.cat([progress.window, _flat(learner.rank_tensors())])
            ranks = self.world.gather(mine, "rank state")
        if not self.world.is_root:
            return
        state = {
            "learner": learner.state_dict(),
            "progress": {f.name: getattr(progress, f.name) for f in fields(progress)},
            "ranks": ranks,
            "same_run": self.same_run,
            "said": self.said,
        }
        name = f"{epochs}+{step}" if step else f"{epochs}"
        best = progress.best()
        spared = [(best["epoch"], 0)] if best else []
        path = self.folder / self.config.checkpoint_format.replace("{epoch}", name)
        try:
            checkpoint.save(path, state)
            checkpoint.rotate(
                self.folder,
                self.config.checkpoint_format,
                keep=self.config.keep_checkpoints,
                spared=spared,
            )
        except OSError as error:
            self.failed_writes += 1
            if last or self.failed_writes == FAILED_WRITES:
                raise CheckpointError(
                    f"{path} could not be written ({self.failed_writes} in a row): {error}; the older ones are as "
                    "they were: make room, and start the same command again"
                ) from error
            print(f"warning: {path} could not be written: {error}; training goes on", flush=True)
        else:
            self.failed_writes = 0

    def export(self, model: nn.Module) -> None:
        """Write the weights as model.safetensors, which torchvision's net of that name loads as it is.

        Raises:
            CheckpointError: It cannot be written.
        """
        from safetensors.torch import save

        if self.world.is_root:
            path = self.folder / "model.safetensors"
            state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
            try:
                with checkpoint.writing(path) as file:
                    file.write(save(state))
            except OSError as error:
                raise CheckpointError(
                    f"{path} could not be written: {error}; the training is done and its checkpoint is there: "
                    "make room, and start the same command again"
                ) from error

    def _load_rank(self, ranks: Tensor, learner: Learner, progress: Progress) -> None:
        """Take this rank's part of what the ranks had of their own."""
        if len(ranks) == self.world.size:
            mine = ranks[self.world.rank]
        else:  # another number of ranks: the root takes the sums, all take the average statistics
            mine = ranks.mean(0)
            mine[:4] = ranks[:, :4].sum(0) if self.world.is_root else 0
        progress.window = mine[:4].clone()
        tensors = learner.rank_tensors()
        for tensor, values in zip(
            tensors, mine[4:].split([t.numel() for t in tensors]), strict=True
        ):
            tensor.copy_(values.view_as(tensor))


class Found(NamedTuple):
    """A checkpoint to go on from."""

    path: str
    state: dict[str, Any]


@contextlib.contextmanager
def claimed(folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Make the run folder, and keep other jobs out of it meanwhile.

    The lock is the kernel's, which frees it however this process ends. File systems without locks do without.

    Args:
        folder: To claim.
        waiting: Called again and again as long as another job has it.

    Raises:
        CheckpointError: The folder cannot be made or written.
        UsageError: Another job has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(
            f"--log-dir: {folder} cannot be written: {error}; give a folder that can"
        ) from error
    try:
        _take(lock, folder, waiting)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its owner's name
            os.truncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(lock)


def _take(lock: int, folder: Path, waiting: Callable[[], None]) -> None:
    deadline, told = time.monotonic() + _LOCK_SECONDS, False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(lock, 1000, 0).decode(errors="replace") or "another process"
            if time.monotonic() > deadline:
                raise UsageError(
                    f"--run-name: {folder} is in use by {owner}; wait until that job has ended, or give another name"
                ) from error
            if not told:
                print(f"{folder} is in use by {owner}: waiting for its end", flush=True)
            told = True
            waiting()
            time.sleep(0.2)
        except OSError:
            return None


def find(config: Config, folder: Path, world: World) -> Found | None:
    """Read what --resume asks for: on the root from the disk, on the others from the root.

    Raises:
        CheckpointError: There are checkpoints, but none that can be used.
        UsageError: The folder is taken, and --resume is never.
    """
    content, path = world.from_root(
        _read_newest(config, folder) if world.is_root else None, "checkpoint"
    )
    if isinstance(content, Exception):
        raise content
    return None if content is None else Found(path, checkpoint.loads(content))


def _read_newest(config: Config, folder: Path) -> tuple[bytes | Exception | None, str]:
    """The bytes to go on from (None: start afresh; an error is for all ranks to raise), and their path."""
    found = checkpoint.newest_first(folder, config.checkpoint_format)
    if config.resume == "never":
        taken = bool(found) or (folder / "metrics.jsonl").exists()
        message = (
            f"--resume never: {folder} already holds a run; give another --run-name, or remove it"
        )
        return UsageError(message) if taken else None, str(folder)
    if not found:
        other = _other_format(config, folder)
        if other is not None or config.resume == "auto":
            return other, str(folder)
        content = _read(Path(config.resume))
        if isinstance(content, Exception):
            content = CheckpointError(f"--resume {config.resume}: {content}")
        return content, config.resume
    if config.resume != "auto" and Path(config.resume).resolve() != found[0][1].resolve():
        print(
            f"--resume {config.resume}: passed over, since {folder} has checkpoints of its own; to begin there "
            "again, move them away, or give another --run-name",
            flush=True,
        )
    for _, path in found:
        content = _read(path)
        if not isinstance(content, Exception):
            return content, str(path)
        print(f"warning: {path} cannot be used: {content}", flush=True)
    message = (
        f"--resume {config.resume}: none of the {len(found)} checkpoints in {folder} can be used; "
        "remove them to start afresh, or begin from another with --resume PATH and another --run-name"
    )
    return CheckpointError(message), str(folder)


def _other_format(config: Config, folder: Path) -> UsageError | None:
    """An error if the folder's checkpoints have names of another format than the one asked for."""
    try:
        theirs = json.loads((folder / "config.json").read_bytes())["flags"]["checkpoint_format"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not checkpoint.newest_first(folder, theirs):
        return None
    return UsageError(
        f"--checkpoint-format {config.checkpoint_format}: the checkpoints in {folder} are called {theirs}; give "
        "that, or another --run-name"
    )


def run_folder(config: Config) -> Path:
    """Where a run is kept."""
    return Path(config.log_dir) / (config.run_name or run_name(config))


def run_name(config: Config) -> str:
    """A folder name made of what was said: the same command finds it again, on another number of ranks too."""
    if config.effective_batch_size is None:
        batch = f"bs{config.batch_size}x{config.batches_per_allreduce}"
    else:
        batch = f"ebs{config.effective_batch_size}"
    scaling = "" if config.lr_scaling == "keep" else f"-{config.lr_scaling}"
    return (
        f"{config.model}_{config.base_op}_{batch}_lr{config.base_lr:g}{scaling}"
        f"_wd{config.wd:g}_ep{config.epochs}_seed{config.seed}"
    )


def same_run(config: Config, source: Any) -> dict[str, Any]:
    """What makes a run this run and no other, but for the effective batch, which a number of ranks may decide."""
    said = identity(config, source) | {
        "train_size": source.train_size,
        "fingerprint of the images' names and labels": source.fingerprint,
    }
    del said["effective_batch_size"]
    return said


def refuse_another_run(found: Found, mine: dict[str, Any]) -> None:
    """Compare a checkpoint with what was said now.

    Raises:
        UsageError: It belongs to another run.
    """
    theirs = found.state["same_run"]
    changed = [
        f"{name} was {theirs.get(name)!r} and is {value!r}"
        for name, value in mine.items()
        if theirs.get(name) != value
    ]
    if changed:
        raise UsageError(
            f"--resume: {found.path} belongs to another run: {'; '.join(changed)}. "
            "Give the same flags, or begin a run of its own under another --run-name"
        )


def versions(source: Any) -> dict[str, str]:
    """Of what computes; `code` is a hash of this package's source, of the images' package, and of the script."""
    code = hashlib.sha256()
    for module in ("__main__", type(source).__module__.partition(".")[0], __package__):
        path = Path(getattr(sys.modules[module], "__file__", None) or "-")
        files = [path]
        if path.name == "__init__.py":
            files = sorted([*path.parent.rglob("*.py"), *path.parent.rglob("*.c")])
        for file in filter(Path.is_file, files):
            code.update(file.read_bytes())
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "code": code.hexdigest()[:12],
    }


def _read(path: Path) -> bytes | Exception:
    try:
        content = path.read_bytes()
        if not checkpoint.loads(content).keys() >= _PARTS:
            raise CheckpointError("not a checkpoint of this trainer")
    except (OSError, CheckpointError) as error:
        return error
    return content


def _flat(tensors: list[Tensor]) -> Tensor:
    """All in one float64 vector, which holds float32 values and counts exactly."""
    parts = [t.detach().double().flatten().cpu() for t in tensors]
    return torch.cat([torch.empty(0, dtype=torch.float64), *parts])
