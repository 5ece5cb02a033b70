"""What the model must know about a machine: measured by `calibrate`, or assumed for a known GPU and network."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scaling.model import FREE, Link
from lars.errors import UsageError
from lars.run.files import atomic_write

VERSION = 1  # of the file that `save` writes


@dataclass(frozen=True)
class Machine:
    """The parameters of the model. Times are seconds, sizes are bytes.

    Attributes:
        name: Name for tables.
        forward: Points (images, seconds) of a forward pass, in rising order. Images between them are interpolated. On a
            CPU, the seconds are those on a core of its own.
        backward: The same for a backward pass.
        update: Time of a step that does not depend on the images: the optimizer and clearing the gradients.
        gradients: Bytes of each gradient in the order of the backward pass.
        ready: When each gradient is complete, as a share of the backward pass.
        norms: BatchNorm layers.
        sent: Share of the bytes that are sent. 0.5: gradients of 4 bytes are sent as numbers of 2 bytes.
        per_node: Usual number of ranks of a host.
        usual_batch: Usual number of samples of a rank in a step.
        bucket: Largest bucket of the exchange.
        inside: The link between two ranks of a host.
        network: The link between two hosts; its bandwidth is that of the whole host.
        spread: A sample of relative times of a step's computation. Its mean is 1.
        cores: CPU cores of a host that the ranks and the exchange share. Infinity: GPUs compute.
        others: Other busy processes of the host; see `model.Cores`.
        input_rate: Images per second that the loaders of a host deliver.
        largest_batch: Images of a micro-batch that fit into memory.
        checkpoint: Time to write a checkpoint.
        validation_fixed: Time of a validation besides its forward passes.
        start: Time from the start of the job to the first step.
        about: Where the parameters come from.
    """

    name: str
    forward: tuple[tuple[float, float], ...]
    backward: tuple[tuple[float, float], ...]
    update: float
    gradients: tuple[float, ...]
    ready: tuple[float, ...]
    norms: int = 53
    sent: float = 1.0
    per_node: int = 8
    usual_batch: int = 256
    bucket: float = 16 * 2**20
    inside: Link = FREE
    network: Link = FREE
    spread: tuple[float, ...] = (1.0,)
    cores: float = math.inf
    others: float = 0.0
    input_rate: float = math.inf
    largest_batch: int = 512
    checkpoint: float = 0.0
    validation_fixed: float = 0.0
    start: float = 0.0
    about: str = ""

    def replace(self, **changes: Any) -> Machine:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)


def save(machine: Machine, path: Path, **more: Any) -> None:
    """Write a machine as JSON, with further entries that only people read."""
    content = {"version": VERSION, **more, "machine": dataclasses.asdict(machine)}
    for name in ("inside", "network"):
        content["machine"][name] = getattr(machine, name)._asdict()
    text = json.dumps(_finite(content), indent=1) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def load(path: Path) -> Machine:
    """Read a machine that `save` wrote.

    Raises:
        UsageError: The file cannot be read, or it is not such a file.
    """
    try:
        content = json.loads(path.read_text())
        values = {name: _tuples(value) for name, value in content["machine"].items()}
        for name in ("inside", "network"):
            values[name] = Link(**values[name])
        if content["version"] != VERSION:
            raise ValueError(f"its version is {content['version']}, not {VERSION}")
        return Machine(**values)
    except OSError as error:
        raise UsageError(f"--machine {path}: cannot read it ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--machine {path}: it is not a file of --calibrate ({error}); write one with "
            "python -m benchmarks.scaling --calibrate FILE"
        ) from error


def _finite(value: Any) -> Any:
    """JSON has no infinity, so it becomes a word."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return "inf" if value == math.inf else value


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(each) for name, each in value.items()}
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return math.inf if value == "inf" else value
