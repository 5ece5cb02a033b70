"""The tables of the scaling model, as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.scaling import presets, published
from benchmarks.scaling.machine import Machine
from benchmarks.scaling.predict import Step, limits, training
from lars.run.files import atomic_write

# The most GPUs in the table and the figure of --minutes.
_MOST = 4096


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align the columns of rows. The first row is the head. Columns are right-aligned, except the last."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)] + [row[-1]]).rstrip()
        for row in rows
    )  # fmt: skip


def write_json(path: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON, if a path is given."""
    if path:
        with atomic_write(path) as file:
            file.write((json.dumps(list(rows), indent=1) + "\n").encode())


def duration(seconds: float) -> str:
    """A time with three digits: 12.3 ms, 45.1 s, 12.3 min, 4.56 h, 3.2 days."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    for unit, length, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < most:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 86_400:.3g} days"


def show_steps(
    machine: Machine, steps: Sequence[Step], epochs: float, json_path: Path | None
) -> None:
    """Print predicted speed, times and limits, and write them as JSON."""
    head = ("hosts", "ranks", "batch", "images/s", "per rank", "efficiency", "step", "epoch", f"{epochs:g} epochs",
            "rank-hours", "next bottleneck")  # fmt: skip
    rows: list[Sequence[str]] = [head]
    found: list[dict[str, Any]] = []
    advice: dict[str, str] = {}
    per_rank = steps[0].rate / steps[0].job.ranks
    for step in steps:
        whole, reasons = training(machine, step, epochs), limits(machine, step)
        efficiency = step.rate / step.job.ranks / per_rank
        advice |= {limit.name: limit.help for limit in reasons[:1]}
        reason = (
            f"{reasons[0].name} ({reasons[0].share:.0%} of the step)" if reasons else "computation"
        )
        rate, whole_step = step.rate, step.step
        rows.append((
            str(step.job.nodes), str(step.job.ranks), f"{step.job.batch:,}", f"{rate:,.{0 if rate > 100 else 1}f}",
            f"{rate / step.job.ranks:,.4g}", f"{efficiency:.0%}", duration(whole_step),
            duration(whole.epoch), duration(60 * whole.minutes), f"{whole.gpu_hours:,.3g}", reason,
        ))  # fmt: skip
        found.append(
            dataclasses.asdict(step)
            | {"job": step.job._asdict(), "images_per_second": step.rate, "efficiency": efficiency}
            | {"training": dataclasses.asdict(whole)}
            | {"limits": [dataclasses.asdict(limit) for limit in reasons]}
        )
    print(
        f"Predictions for {machine.name} ({machine.about}). Efficiency is relative to the first row.\n"
    )
    print(table(rows))
    if advice:
        print("\nWhat would help:")
        for name, text in advice.items():
            print(f"  {name}: {text}")
    write_json(json_path, found)


def show_published(json_path: Path | None) -> None:
    """Print the model's errors on published runs."""
    head = (
        "round",
        "GPUs",
        "batch",
        "BN over",
        "published",
        "predicted",
        "error",
        "min publ.",
        "min pred.",
        "error",
        "",
    )
    rows: list[Sequence[str]] = [head]
    found = []
    for point in published.points():
        made = published.compare(point)
        own = presets.GPUS[point.gpu]
        sets = point.rate is not None and abs(point.rate / point.gpus / own.rate - 1) < 1e-3
        known = point.rate is not None
        rows.append((
            point.round, f"{point.gpus} {point.gpu}", f"{point.batch:,}", str(point.bn_ranks),
            f"{point.rate / point.gpus:,.0f}" if point.rate else "-", f"{made.step.rate / point.gpus:,.0f}",
            f"{made.rate_error:+.1%}" if known else "-", f"{point.minutes:.3g}", f"{made.minutes:.3g}",
            f"{made.minutes_error:+.1%}", "sets the speed of this GPU" if sets else "",
        ))  # fmt: skip
        found.append(
            point._asdict()
            | {
                "predicted_rate": made.step.rate,
                "predicted_minutes": made.minutes,
                "sets_speed": sets,
            }
            | {
                "rate_error": made.rate_error if known else None,
                "minutes_error": made.minutes_error,
            }
        )
    print("Images/s per GPU and minutes to 75.9 % top-1, published (MLPerf) and predicted.\n")
    print(table(rows))
    tested = [row for row in found if not row["sets_speed"]]
    for what in ("rate", "minutes"):
        errors = [abs(row[f"{what}_error"]) for row in tested if row[f"{what}_error"] is not None]
        print(
            f"\nmedian error of {what}: {statistics.median(errors):.1%} of {len(errors)} rows that do not set a speed"
        )
    write_json(json_path, found)


def show_minutes(
    machine: Machine, per_node: int, json_path: Path | None, figure: Path | None
) -> None:
    """Print the fastest batch size for each number of GPUs, and those that take at most 10 % longer to 75.9 %."""
    head = (
        "GPUs",
        "fastest batch",
        "per GPU",
        "BN over",
        "epochs",
        "images/s",
        "minutes",
        "GPU-hours",
        "within 10 %",
    )
    rows: list[Sequence[str]] = [head]
    found = []
    clock = published.on_mlperf_clock(machine)
    hosts = [2**power for power in range(13) if 2**power * per_node <= _MOST]
    for nodes in hosts:
        gpus, ranked = nodes * per_node, published.choices(clock, nodes, per_node)
        best = ranked[0]
        near = sorted(c.published.batch for c in ranked[1:] if c.minutes <= 1.1 * best.minutes)
        job = best.step.job
        rows.append((
            f"{gpus:,}", f"{job.batch:,}", f"{job.batch / gpus:.3g}", str(job.bn_ranks), f"{best.published.epochs:g}",
            f"{best.step.rate:,.0f}", f"{best.minutes:.3g}", f"{best.gpu_hours:.3g}",
            ", ".join(f"{batch:,}" for batch in near) or "-",
        ))  # fmt: skip
        found += [
            {"gpus": gpus, "batch": c.published.batch, "epochs": c.published.epochs, "source": c.published.source}
            | {"minutes": c.minutes, "gpu_hours": c.gpu_hours, "images_per_second": c.step.rate}
            for c in ranked
        ]  # fmt: skip
    print(
        f"Predicted minutes to 75.9 % top-1 on {machine.name}: the fastest of {len(published.epochs())} batch sizes."
    )
    print(
        "The epochs are published (MLPerf). The clock leaves out the start of the job, as MLPerf's does.\n"
    )
    print(table(rows))
    print(
        "\nRecipes: launch/recipes/imagenet_mlperf_*.args (this project has not run them on this many GPUs)"
    )
    write_json(json_path, found)
    if figure:
        from benchmarks.scaling import draw

        known = {
            name: presets.machine(name, presets.NETWORKS[network])
            for name, network in (("a100", "ib-hdr-8"), ("h100", "ib-ndr-8"))
        }
        lines = {
            name: [(made, 2**power, published.PER_NODE) for power in range(10)]
            for name, made in known.items()
        }
        lines[machine.name] = [(machine, nodes, per_node) for nodes in hosts]
        draw.minutes(lines, figure)
