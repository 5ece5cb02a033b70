"""The parts of the acceptance run, in their order."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """A part of the acceptance run.

    Attributes:
        name: What --only and --skip call it.
        module: The module with its function ``run(budget)``.
        weight: Its share of the time, in seconds of a run of 10 minutes.
        what: What it does, for --list.
        on_all_ranks: Whether all ranks of the launcher take part. The other parts run on rank 0.
    """

    name: str
    module: str
    weight: float
    what: str
    on_all_ranks: bool = False


def _part(name: str, weight: float, what: str, *, on_all_ranks: bool = False) -> Part:
    module = f"{__name__}.{name.replace('-', '_')}"
    return Part(name, module, weight, what, on_all_ranks)


PARTS = {
    part.name: part
    for part in (
        _part("doctor", 30, "the checks of python -m launch.doctor"),
        _part("gpu-tests", 60, "the tests of this repository that need a GPU"),
        _part("no-wait", 30, "a training step never lets the host wait for the GPU"),
        _part("step", 120, "images/s of training steps: precisions, layouts, batch sizes"),
        _part("optimizer", 40, "time and memory traffic of optimizer steps beside torch's fused ones"),
        _part("loader", 60, "images/s of the loaders: the built-in one, and DALI"),
        _part("end-to-end", 50, "images/s of training on images that the loader decodes"),
        _part("resume", 60, "a run that was stopped and resumed ends with the same weights"),
        _part("compile", 100, "images/s of a training step with torch.compile"),
        _part("ranks", 60, "the ranks, their allreduces and their training step", on_all_ranks=True),
    )
}  # fmt: skip
