"""Reading a network's weights from a file: our checkpoints and exports, and the files of other programs."""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lars.comm.state import broadcast_state
from lars.comm.world import World
from lars.errors import CheckpointError, UsageError
from lars.importing import cause
from lars.models.pretrained import network_of
from lars.run import checkpoint

State = dict[str, Tensor]

# Keys under which programs store a state_dict, and its moving average, in a larger dict: pytorch/examples, timm,
# torchvision's references and others.
_WRAPPERS = ("state_dict", "model", "net", "backbone")
_AVERAGES = ("state_dict_ema", "model_ema")

# Parts of a name that wrappers of a network add: DistributedDataParallel, AveragedModel and torch.compile.
_ADDED = re.compile(r"(?<![^.])(?:module|_orig_mod)\.")


class Weights(NamedTuple):
    """The content of a file of weights.

    Attributes:
        networks: The state_dict of "val", the network, and if the file has it, of "val_ema", its moving average.
        statistics: The values of all buffers of each network, if they differ from those in `networks`: within an epoch
            every rank has its own BatchNorm statistics, and these are their means.
        model: The name of the model. Empty if the file does not state it.
        classes: The name of each class. Empty if the file does not state them.
    """

    networks: dict[str, State]
    statistics: dict[str, Tensor] = {}  # noqa: RUF012 - never changed
    model: str = ""
    classes: list[str] = []  # noqa: RUF012 - never changed


def read(path: Path) -> Weights:
    """Read weights onto the CPU. The file cannot run code.

    Args:
        path: A checkpoint of this trainer, a safetensors file, or a file of torch.save with a state_dict. The
            state_dict may lie in a larger dict, and its names may begin with "module.".

    Raises:
        CheckpointError: The file cannot be read, or holds no weights. The message does not name the file.
    """
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    content = checkpoint.load(path) if checkpoint.is_ours(path) else _unpickled(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"it holds an object of type {type(content).__name__}, not weights")
    return _from_checkpoint(content) if "learner" in content else _from_others(content)


def read_on_root(path: Path, world: World) -> Weights:
    """Read weights on the root and send them to all ranks; see `read`.

    Raises:
        CheckpointError: The file cannot be used. The message names the flag --evaluate.
    """
    found, refusal = None, None
    if world.is_root:
        try:
            found = read(path)
        except CheckpointError as error:
            refusal = CheckpointError(f"--evaluate {path}: {error}")
    refusal = world.broadcast_object(refusal, "weights found")
    if refusal is not None:
        raise refusal
    return Weights(**broadcast_state(found and found._asdict(), world))


class Fit(NamedTuple):
    """How the tensors of a file fit a network.

    Attributes:
        missing: Names that only the network has, without the counters of BatchNorm.
        unexpected: Names that only the file has.
        shapes: Names that have another shape in the file.
    """

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]


def compare(state: State, wanted: State) -> Fit:
    """Compare the weights of a file with the state_dict of a network."""
    # Old files of torchvision lack the counters of BatchNorm, which validation does not use.
    missing = [n for n in wanted if n not in state and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in state if n not in wanted]
    shapes = [n for n in wanted if n in state and state[n].shape != wanted[n].shape]
    return Fit(missing, unexpected, shapes)


def faults(fit: Fit, state: State, wanted: State) -> str:
    """What does not fit, in words. Empty if everything fits."""
    shapes = [
        f"{n} has shape {tuple(state[n].shape)} instead of {tuple(wanted[n].shape)}"
        for n in fit.shapes
    ]
    return "; ".join(
        [
            *listed("missing", fit.missing),
            *listed("unexpected", fit.unexpected),
            *shapes[:3],
            *[f"{len(shapes) - 3} other shapes"] * (len(shapes) > 3),
        ]
    )


def load_into(model: nn.Module, weights: Weights, split: str, path: str, name: str) -> None:
    """Load the network `split` of a file into `model`.

    Args:
        model: The network.
        weights: The content of the file.
        split: The name of the network in `weights.networks`.
        path: The file, for the message.
        name: The name of `model`, for the message.

    Raises:
        UsageError: The weights do not fit. The message names them and the fix.
    """
    wanted = model.state_dict()
    state = without_prefix(weights.networks[split], wanted)
    wrong = faults(compare(state, wanted), state, wanted)
    if wrong:
        likely = weights.model or network_of(state)
        fix = f"use --model {likely}"
        if likely in ("", name):
            fix = "use the --model and the data set for which it was trained"
        raise UsageError(
            f"--evaluate {path}: the weights do not fit --model {name}: {wrong}; {fix}"
        )
    copy_into(model, state, weights.statistics.get(split))


def without_prefix(state: State, wanted: State) -> State:
    """Remove the beginning of names, such as "backbone." or "model.", if more names fit the network without it.

    Names without the prefix stay, so that they are reported.
    """
    prefixes = {""}
    for name in state:
        parts = name.split(".")
        prefixes |= {".".join(parts[:depth]) + "." for depth in (1, 2) if depth < len(parts)}

    def fitting(prefix: str) -> int:
        return sum(name.startswith(prefix) and name[len(prefix) :] in wanted for name in state)

    best = max(sorted(prefixes, key=len), key=fitting)
    return {name.removeprefix(best): value for name, value in state.items()}


@torch.no_grad()
def copy_into(model: nn.Module, state: State, statistics: Tensor | None) -> None:
    """Copy the tensors that the network has, and `Weights.statistics` if there are as many as the network has."""
    model.load_state_dict(state, strict=False)
    buffers = list(model.buffers())
    sizes = [buffer.numel() for buffer in buffers]
    if statistics is not None and sum(sizes) == len(statistics):
        for buffer, values in zip(buffers, statistics.split(sizes), strict=True):
            buffer.copy_(values.view_as(buffer))


def refuse_other_classes(path: str, weights: Weights, classes: Sequence[str]) -> None:
    """Compare the class names of a file with those of the images, if both are known.

    Raises:
        UsageError: Their numbers differ, or a name has another label. Names that only one side knows are accepted,
            because one data set may have several names for a class.
    """
    theirs = {name: label for label, name in enumerate(weights.classes)}
    if not theirs or not classes:
        return
    moved = [
        f"class {name} has label {theirs[name]} in the file, but {label} in the validation images"
        for label, name in enumerate(classes)
        if theirs.get(name, label) != label
    ]
    if len(theirs) != len(classes):
        moved = [f"it has {len(theirs)} classes, but the validation images have {len(classes)}"]
    if moved:
        raise UsageError(
            f"--evaluate {path}: {moved[0]}; use the validation images of the data set for which it was trained"
        )


def listed(what: str, names: list[str]) -> list[str]:
    """At most three of the names, and their number."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [f"{len(names)} {what} ({shown})"] if names else []


def _from_checkpoint(content: dict[str, Any]) -> Weights:
    learner, description = content["learner"], content["said"]
    networks = {"val": _plain(learner["model"].items())}
    if learner["average"] is not None:
        networks["val_ema"] = _plain(learner["average"].items())
    statistics = {}
    if content["ranks"] is not None:
        sums = len(content["progress"]["totals"])
        means = content["ranks"].mean(0)[sums:].chunk(len(networks))
        statistics = dict(zip(networks, means, strict=True))
    return Weights(
        networks, statistics, description["flags"]["model"], list(description.get("classes", []))
    )


def _from_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            description = (file.metadata() or {}).get("description", "{}")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"it cannot be read: {error}") from error
    try:
        classes = json.loads(description).get("classes", [])
    except (ValueError, AttributeError):  # the description of another program
        classes = []
    return Weights({"val": _plain(state.items())}, classes=classes)


def _from_others(content: dict[str, Any]) -> Weights:
    """The weights in a file of another program: a state_dict, or a dict with a state_dict."""
    networks = {}
    for split, keys in (("val", _WRAPPERS), ("val_ema", _AVERAGES)):
        states = (_plain(content[k].items()) for k in keys if isinstance(content.get(k), Mapping))
        found = next(filter(None, states), None)
        if found is not None:
            networks[split] = found
    if not networks:
        networks = {"val": _plain(content.items())}
    if not any(networks.values()):
        entries = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise CheckpointError(
            f"it holds no weights: it has {entries}, but a state_dict, or one under {', '.join(_WRAPPERS)} is needed"
        )
    return Weights(networks)


def _plain(named: Iterable[tuple[str, Any]]) -> State:
    """The tensors by their names in the network, without what wrappers add."""
    return {
        _ADDED.sub("", name): value
        for name, value in named
        if isinstance(value, Tensor) and name != "n_averaged"
    }


def _unpickled(path: Path) -> Any:
    """Read a file of torch.save that holds only tensors and plain values."""
    try:
        # The command line of timm and torchvision's references is a Namespace, which only stores values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*TorchScript", UserWarning)  # it is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {error}") from error
    except Exception as error:  # the unpickler of torch.load raises many types
        needed = re.search(r"GLOBAL (\S+)", str(error))
        if needed or "TorchScript" in str(error):
            code = needed[1] if needed else "a TorchScript program"
            raise CheckpointError(
                f"it is refused because it needs code ({code}), which could do anything on this machine; load it "
                "where you trust it, and save the weights alone: torch.save(model.state_dict(), PATH)"
            ) from error
        raise CheckpointError(
            f"it is not a file of weights, or it is damaged ({cause(error).partition('. ')[0]}); copy it again, or "
            "name another file"
        ) from error
