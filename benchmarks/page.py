"""The results of ``python -m benchmarks`` as JSON and as Markdown, and the parts of a page that hold them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from typing import Any

from benchmarks.rounds import Comparison, Suite

PACKAGES = (
    *("torch", "torchvision", "numpy", "pillow", "simplejpeg", "safetensors", "horovod", "timm"),
    *("pytorch_optimizer", "nvidia-dali-cuda130"),
)


def machine() -> dict[str, Any]:
    """The processor, its cores, the memory, the system, and the versions of packages."""
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": versions,
    }


def result(
    suite: Suite, about: str, compared: Comparison, values: dict[str, list[float]], **more: Any
) -> dict[str, Any]:
    """The entry of a suite in the JSON file.

    A ratio is larger than 1 if the candidate is faster than the row that it is compared with. It is the median of the
    ratios of each round. `lowest` and `highest` are the range of single rounds.
    """
    rows = []
    for row in compared.rows:
        entry: dict[str, Any] = {"name": row.name, "against": row.against, "missing": row.lacks}
        own, other = values.get(row.name, []), values.get(row.against, [])
        if own:
            entry["values"] = [float(f"{value:.4g}") for value in own]
            entry["median"] = statistics.median(own)
        if own and other:
            faster = suite.unit.endswith("/s")
            pairs = zip(own, other, strict=True)
            ratios = [a / b if faster else b / a for a, b in pairs]
            entry |= {
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
        rows.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in entry.items()})
    return {
        "name": suite.name, "title": suite.title, "about": about, "unit": suite.unit,
        "rounds": max(map(len, values.values()), default=0), **more, "rows": rows,
    }  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    where, loads = results["machine"], [suite["load"] for suite in results["suites"]]
    packages = ", ".join(f"{name} {v}" for name, v in where["packages"].items() if v)
    lines = [
        f"`{results['command']}` wrote the following tables on {results['date']} in {results['minutes']} minutes.",
        "",
        f"* Machine: {where['processor']}, {where['cores']} cores, {where['memory_gib']} GiB, {where['system']}, one "
        "thread per process.",
        f"* Python {where['python']}, {packages}.",
        f"* Load of the machine (processes that run or wait) at the start of a table: {min(loads)} to {max(loads)}.",
        "* The relative speed is the median of the ratios of each round, with the range of single rounds in brackets. "
        "More than 1 is faster than the row it is compared with, which has 1.",
    ]
    for suite in results["suites"]:
        lines += ["", f"### {suite['title']}", "", f"{suite['about']} {rounds(suite)}.", ""]
        lines += table(suite)
    return "\n".join(lines) + "\n"


def rounds(suite: dict[str, Any]) -> str:
    """The number of rounds in words."""
    return f"{suite['rounds']} round{'s' * (suite['rounds'] != 1)}"


def table(suite: dict[str, Any]) -> list[str]:
    """The lines of a table. It has a column of ratios if a row has one."""
    compares = any("ratio" in row for row in suite["rows"])
    lines = [f"| candidate | {suite['unit']} |" + " relative speed |" * compares]
    lines.append("|---|---|" + "---|" * compares)
    for row in suite["rows"]:
        cells = [row["name"], figure(row["median"]) if "median" in row else ""]
        if row["missing"]:
            cells[1] = f"{row['missing']} is not installed"
        if compares:
            cells.append(compared(row))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def compared(row: dict[str, Any]) -> str:
    """The ratio of a row."""
    if "ratio" not in row:
        return ""
    if row["name"] == row["against"]:
        return "1"
    return f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f}) x {row['against']}"


def figure(value: float) -> str:
    """Three digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def insert(page: str, name: str, text: str) -> str:
    """Replace what lies between the two markers of `name` in a page.

    Raises:
        ValueError: The page has no such markers.
    """
    begin, end = markers(name)
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"it needs the lines {begin} and {end}")
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def markers(name: str) -> tuple[str, str]:
    """The lines around the results `name` in a page."""
    return f"<!-- begin {name} -->", f"<!-- end {name} -->"


def today() -> str:
    """The date in UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime())
