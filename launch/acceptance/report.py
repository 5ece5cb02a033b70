"""The table of all rows, acceptance.json and acceptance.png."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lars.run.files import atomic_write
from launch.acceptance.rows import FAILED, NOT_TESTED, OK, SLOW, Row
from launch.doctor.main import aligned

_PACKAGES = ("torch", "torchvision", "numpy", "horovod", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "simplejpeg",
             "mpi4py", "pytest", "matplotlib")  # fmt: skip

_DRIVER_SECONDS = 30.0


class Report:
    """Collects rows. After each row the file acceptance.json is complete, whatever happens later."""

    def __init__(self, folder: Path, began: datetime.datetime) -> None:
        """Start a report in `folder`, which exists."""
        self.folder, self.began, self.since = folder, began, time.monotonic()
        self.machine = machine()
        self.rows: list[tuple[str, Row]] = []
        for old in (*folder.glob("logs/*.log"), folder / "acceptance.png"):
            old.unlink(missing_ok=True)

    def log_of(self, part: str) -> Path:
        """The file for what a part prints."""
        return self.folder / "logs" / f"{part}.log"

    def add(self, part: str, row: Row) -> None:
        """Add a row, and write the file."""
        self.rows.append((part, row))
        self._write()

    def table(self) -> str:
        """All rows as aligned columns, and a line that counts the verdicts."""
        lines: list[tuple[str, ...]] = [("part", "what", "measured", "expected", "verdict", "note")]
        for part, row in self.rows:
            lines.append((part, row.what, number(row), limits(row), row.verdict, row.note))
        counts = {v: sum(row.verdict == v for _, row in self.rows) for v in (OK, SLOW, FAILED, NOT_TESTED)}  # fmt: skip
        total = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
        return f"{aligned(lines)}\n\n{total}, in {time.monotonic() - self.since:.0f} s"

    def finish(self) -> Iterator[Path]:
        """Write the files, and yield their paths. Without matplotlib there is no figure."""
        self._write()
        yield self.folder / "acceptance.json"
        if importlib.util.find_spec("matplotlib"):
            from launch.acceptance.draw import draw

            path = self.folder / "acceptance.png"
            if draw([row for _, row in self.rows], path):
                yield path
        else:
            print("no figure: matplotlib is not installed; ./launch/setup.sh")

    def _write(self) -> None:
        rows = [{"part": part} | asdict(row) for part, row in self.rows]
        content = {
            "started": self.began.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.since, 1),
            "machine": self.machine,
            "versions": versions(),
            "rows": rows,
        }
        with atomic_write(self.folder / "acceptance.json") as file:
            file.write(json.dumps(content, indent=1).encode())


def number(row: Row) -> str:
    """The measured value with its unit."""
    return "" if row.value is None else f"{row.value:,.4g} {row.unit}"


def limits(row: Row) -> str:
    """The range in which the value should be."""
    if row.low is None:
        return "" if row.high is None else f"<= {row.high:,.4g}"
    return f">= {row.low:,.4g}" if row.high is None else f"{row.low:,.0f} to {row.high:,.0f}"


def line(row: Row) -> str:
    """A row as one line of text."""
    return "  ".join(
        word for word in (f"{row.verdict:10}", row.what, number(row), row.note) if word
    )


def machine() -> dict[str, Any]:
    """The host: name, system, CPU, memory, and the GPUs that torch sees."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpus": _gpus(),
    }


def _gpus() -> list[str]:
    """Names of the GPUs. A process of its own asks for them: after that, no process with CUDA can be forked."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        try:
            return pool.apply_async(_gpus_here).get(_DRIVER_SECONDS)
        except multiprocessing.TimeoutError:
            return ["the driver does not answer"]


def _gpus_here() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
