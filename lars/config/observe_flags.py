"""The flags that choose what a run reports, besides its usual files."""

from __future__ import annotations

from dataclasses import dataclass

from lars.config.flags import flag


@dataclass(frozen=True)
class ObserveFlags:
    """Custom observers, the profile of a few steps, and the log of MLPerf."""

    observer: tuple[str, ...] = flag(
        (),
        "package.module:Class of a custom observer, a subclass of lars.observe.Observer; may be repeated",
        group="observe",
        repeatable=True,
        same_run=False,
    )
    profile: int | None = flag(
        None,
        "profile steps N to N+5 of the run on rank 0 with torch.profiler, and write the trace to the run folder",
        group="observe",
        at_least=1,
        same_run=False,
    )
    mllog: bool = flag(
        False,
        "write the lines of MLPerf Training's log (:::MLLOG) to mllog.txt in the run folder",
        group="observe",
        same_run=False,
    )
