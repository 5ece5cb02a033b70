"""``--init``: the weights with which a new run starts. A resumed run does not read them again."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from torch import nn

from lars.comm.world import World
from lars.config.config import Config
from lars.errors import CheckpointError, UsageError
from lars.importing import is_import_path
from lars.models.head import heads_of
from lars.models.pretrained import network_of, pretrained_file
from lars.run import checkpoint
from lars.run.identity import run_folder
from lars.run.resume import LoadedCheckpoint
from lars.run.weights import (
    State,
    Weights,
    compare,
    copy_into,
    faults,
    listed,
    read,
    without_prefix,
)

# At least this share of the network's tensors without its head must come from the file.
LEAST_SHARE = 0.5
# So many digits of the file's SHA-256 are part of the identity of a run.
_DIGITS = 16


def file_of(config: Config) -> Path:
    """The file that --init names. Published weights of torchvision are downloaded if they are missing.

    Raises:
        CheckpointError: The file does not exist.
        UsageError: The published weights are unknown, or cannot be downloaded.
    """
    path = Path(config.init or "")
    if path.is_file():
        return path
    if re.fullmatch(r"[A-Z][A-Z0-9_]+", config.init or "") and not path.exists():
        return pretrained_file(config.model, config.init or "")
    what = "is a folder" if path.is_dir() else "does not exist"
    raise CheckpointError(
        f"--init {config.init} {what}; name a file of weights, such as RUN/best.safetensors or resnet50.pth, or "
        "weights of torchvision, such as IMAGENET1K_V1"
    )


def check(config: Config) -> None:
    """Check that the file of --init is there, before time is spent. A run that can resume does not need it.

    Raises:
        CheckpointError, UsageError: See `file_of`.
    """
    begins = not checkpoint.newest_first(run_folder(config), config.checkpoint_format)
    if config.init is not None and begins and not config.benchmark:
        file_of(config)


def identity(config: Config, loaded: LoadedCheckpoint | None) -> str | None:
    """What identifies the initial weights of a run: the beginning of the SHA-256 of their file.

    A run that is resumed with the same --init keeps its identity, even if the file has been removed.

    Raises:
        CheckpointError, UsageError: The run is new, and there is no such file.
    """
    if config.init is None:
        return None
    if loaded is not None:
        if loaded.state["said"]["flags"].get("init") == config.init:
            known: str | None = loaded.state["same_run"].get("init")
            return known
        if not Path(config.init).is_file():
            return f"{config.init} (no such file)"
    return digest(file_of(config))[:_DIGITS]


def digest(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(config: Config, model: nn.Module, num_classes: int, world: World) -> dict[str, Any]:
    """Load the file of --init into a network with initial weights. Only the root does this.

    Args:
        config: The flags.
        model: The network, whose tensors change in place on the root. The other ranks get them when the learner is
            built.
        num_classes: The number of classes.
        world: The ranks.

    Returns:
        The same on all ranks: the value of --init ("from"), the SHA-256 of the file ("sha256"), the network in it
        ("network"), the head layers that keep their random weights ("new_heads"), and the names of tensors that only
        one side has ("missing" in the file, "unexpected" in it).

    Raises:
        CheckpointError: The file cannot be read.
        UsageError: The weights do not fit.
    """
    found: Any = None
    if world.is_root:
        try:
            found = _load(config, model, num_classes)
        except (CheckpointError, UsageError) as error:
            found = error
    found = world.broadcast_object(found, "initial weights")
    if isinstance(found, Exception):
        raise found
    record: dict[str, Any] = found
    return record


def _load(config: Config, model: nn.Module, num_classes: int) -> dict[str, Any]:
    path = file_of(config)
    try:
        weights = read(path)
    except CheckpointError as error:
        raise CheckpointError(f"--init {config.init}: {error}") from error
    split = list(weights.networks)[-1]  # the moving average if there is one
    wanted = model.state_dict()
    state = without_prefix(weights.networks[split], wanted)
    heads = new_heads(model, state, num_classes)
    of_heads = tuple(f"{head}." for head in heads)
    state_body = {name: value for name, value in state.items() if not name.startswith(of_heads)}
    body = {name: value for name, value in wanted.items() if not name.startswith(of_heads)}
    fit = compare(state_body, body)
    _refuse_another_network(config, weights, state, fit, body, faults(fit, state_body, body))
    _refuse_nonfinite(config, state_body)
    copy_into(model, state_body, weights.statistics.get(split))
    return {
        "from": config.init,
        "sha256": digest(path),
        "network": split,
        "new_heads": heads,
        "missing": fit.missing,
        "unexpected": fit.unexpected,
    }


def new_heads(model: nn.Module, state: State, num_classes: int) -> list[str]:
    """The head layers that the file cannot fill: it lacks them, or has another number of classes.

    Auxiliary heads count: all layers with `num_classes` outputs of which the file has another number.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and len(module.weight) == num_classes
    ]
    last = heads_of(model, num_classes)
    found = []
    for name, module in layers:
        theirs = state.get(f"{name}.weight")
        if theirs is None:
            if name in last:
                found.append(name)
        elif theirs.shape[1:] == module.weight.shape[1:] and len(theirs) != num_classes:
            found.append(name)
    return found


def _refuse_another_network(
    config: Config, weights: Weights, state: State, fit: Any, body: State, wrong: str
) -> None:
    """Refuse weights of which too few fit, and those of another network of torchvision."""
    if not any(fit):
        return
    share = 1 - (len(fit.missing) + len(fit.shapes)) / max(len(body), 1)
    likely = network_of(state) or weights.model
    known = likely not in ("", config.model)
    # A network of the user may have the layers of any other.
    another = known and not (is_import_path(likely) or is_import_path(config.model))
    if not fit.shapes and share >= LEAST_SHARE and not another:
        return
    fix = "use the --model, --image-size and --small-stem with which they were trained"
    if known:
        fix = f"they seem to be those of {likely}: use --model {likely}"
    raise UsageError(
        f"--init {config.init}: the weights do not fit --model {config.model}: {wrong}; {fix}"
    )


def _refuse_nonfinite(config: Config, state: State) -> None:
    """Refuse weights with which no step could be taken."""
    names = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if names:
        (text,) = listed("of its tensors", names)
        raise UsageError(
            f"--init {config.init}: values are not finite in {text}, so its training had diverged; use an earlier "
            "checkpoint"
        )
