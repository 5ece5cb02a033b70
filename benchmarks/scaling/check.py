"""Compare predicted with measured step times: 1, 2 and 4 ranks on this machine, and two hosts with shaped links.

Every job measures its parameters and real steps of the trainer, in turn. The predictions use only these parameters:

* Ranks of this machine: forward and backward passes and the link come from the job with 2 ranks of the same backend.
* Hosts: the passes come from the same job, where no gradient is sent while they are measured. The link is predicted
  twice. "from numbers": from the cost of messages between these hosts without any limit, and from the chosen rate and
  delay. "calibrated": fitted to allreduces on the shaped link.

Jobs of one backend measure in turn, step by step, so that they see the same load of the machine. All jobs are repeated
in rounds, and the prediction of a round is compared with the measurement of the same round.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.scaling import hosts
from benchmarks.scaling import machine as machines
from benchmarks.scaling.hosts import Shape
from benchmarks.scaling.machine import Machine
from benchmarks.scaling.model import Link
from benchmarks.scaling.predict import Job, predict
from benchmarks.scaling.tables import table, write_json
from lars.errors import UsageError

RANKS = (1, 2, 4)
SHAPES = [Shape(rate, delay) for rate in (40e6, 125e6, 375e6) for delay in (0.0, 2e-3)]
_OPEN = Shape(None, 0.0)
# Bytes per second that remain of a rate for content: packets of 1500 bytes have 1448 bytes of it.
_CONTENT = 1448 / 1514


class Point(NamedTuple):
    """A predicted and a measured step time in seconds, of one round."""

    where: str
    batch: int
    how: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1


class Result(NamedTuple):
    """What a job of --calibrate wrote: the machine, and the measured step time by samples per rank."""

    machine: Machine
    steps: dict[int, float]


def main(args: argparse.Namespace) -> None:
    """Run all rounds and print every point's error."""
    backends = [name for name, command in _launchers(2).items() if command]
    reason = hosts.why_not()
    if reason:
        print(f"no hosts with shaped links: {reason}", flush=True)
    points: list[Point] = []
    for number in range(args.repeat):
        print(
            f"round {number + 1} of {args.repeat}, load average {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        for backend in backends:
            points += shown(ranks_here(args, backend))
        if not reason:
            points += shown(shaped_hosts(args))
    rows = summary(points)
    print(
        f"\n{args.model} at {args.image_size} px, {os.cpu_count()} cores, medians of {args.repeat} rounds\n"
    )
    print(
        table([("where", "samples per rank", "predicted", "measured", "error", ""), *_cells(rows)])
    )
    for how in dict.fromkeys(row["how"] for row in rows):
        errors = [abs(row["error"]) for row in rows if row["how"] == how]
        within = sum(error <= 0.15 for error in errors)
        print(
            f"\n{how}: median error {statistics.median(errors):.1%}, {within} of {len(errors)} within 15 %"
        )
    write_json(args.json, rows)
    if args.out:
        from benchmarks.scaling import draw

        draw.errors(rows, args.out)


def shown(points: Iterable[Point]) -> Iterator[Point]:
    """Print each point of a round as it arrives."""
    for p in points:
        times = f"predicted {1000 * p.predicted:.0f} ms, measured {1000 * p.measured:.0f} ms"
        print(f"  {p.where}, {p.batch} per rank, {p.how}: {times} ({p.error:+.1%})", flush=True)
        yield p


def ranks_here(args: argparse.Namespace, backend: str) -> Iterator[Point]:
    """Predict 1, 2 and 4 ranks of this machine from the parameters of 2 ranks."""
    found = _jobs_in_turn(args, backend)
    base = found[2].machine
    name = {"horovod": "Horovod", "torch": "torch"}[backend]
    for ranks, result in found.items():
        where = f"{ranks} rank{'s' * (ranks > 1)}, {name}"
        for batch, seconds in result.steps.items():
            step = predict(base, Job(1, ranks, ranks * batch)).step
            yield Point(where, batch, "ranks of this machine", step, seconds)


def shaped_hosts(args: argparse.Namespace) -> Iterator[Point]:
    """Predict 2 hosts for each shape of their link."""
    unlimited = _host_job(args, _OPEN).machine.network
    for shape in SHAPES:
        result = _host_job(args, shape)
        for how, link in (
            ("hosts, from numbers", shaped(unlimited, shape)),
            ("hosts, calibrated", result.machine.network),
        ):
            # Both hosts share this machine. The rank of the other host counts as another process.
            machine = result.machine.replace(
                network=link,
                cores=result.machine.cores / 2,
                others=max(0.0, (result.machine.others - 1) / 2),
            )
            for batch, seconds in result.steps.items():
                step = predict(machine, Job(2, 1, 2 * batch, algorithm="ring")).step
                yield Point(f"2 hosts, {shape}", batch, how, step, seconds)


def shaped(unlimited: Link, shape: Shape) -> Link:
    """The link between two hosts after `tc` has limited its rate and a delay has been added."""
    rate = math.inf if shape.rate is None else _CONTENT * shape.rate
    return unlimited._replace(
        latency=unlimited.latency + shape.delay, bandwidth=min(unlimited.bandwidth, rate)
    )


def summary(points: Sequence[Point]) -> list[dict[str, Any]]:
    """One row per place, batch size and kind of prediction, with medians over the rounds."""
    groups: dict[tuple[str, int, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.where, point.batch, point.how), []).append(point)
    return [
        {"where": where, "batch": batch, "how": how}
        | {
            name: statistics.median(getattr(p, name) for p in group)
            for name in ("predicted", "measured", "error")
        }
        for (where, batch, how), group in groups.items()
    ]


def _cells(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (row["where"], str(row["batch"]), f"{1000 * row['predicted']:.0f} ms", f"{1000 * row['measured']:.0f} ms",
         f"{row['error']:+.1%}", row["how"])
        for row in rows
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------- jobs


def _launchers(ranks: int) -> dict[str, list[str] | None]:
    """The command that starts ranks of each backend. None if it is not installed."""
    root = Path(__file__).parents[2]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
    ]
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    horovod = importlib.util.find_spec("horovod") and shutil.which("mpirun", path=places)
    return {
        "horovod": [str(root / "launch/mpirun.sh"), "-np", str(ranks)] if horovod else None,
        "torch": torchrun,
    }


def _module(args: argparse.Namespace) -> list[str]:
    sizes = [str(size) for size in args.batch_sizes]
    return ["-m", "benchmarks.scaling", "--rounds", str(args.rounds), "--model", args.model,
            "--image-size", str(args.image_size), "--batch-sizes", *sizes]  # fmt: skip


def _jobs_in_turn(args: argparse.Namespace, backend: str) -> dict[int, Result]:
    """Run jobs of --calibrate with 1, 2 and 4 ranks that measure in turn, and read their files.

    Raises:
        UsageError: A job failed. The message has the end of its output.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, running = Path(name), {}
        (folder / "turns").write_text("0")
        for place, ranks in enumerate(RANKS):
            command = [*(_launchers(ranks)[backend] or []), *_module(args), "--backend", backend]
            command += ["--calibrate", str(folder / f"{ranks}.json")]
            command += ["--turns", f"{folder / 'turns'}:{place}:{len(RANKS)}"]
            running[ranks] = subprocess.Popen(
                command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        _wait(list(running.values()))
        return {ranks: _read(folder / f"{ranks}.json") for ranks in running}


def _wait(running: Sequence[subprocess.Popen[str]]) -> None:
    """Wait for processes that depend on each other. If one fails, end the others and report it."""
    try:
        while any(process.poll() is None for process in running):
            time.sleep(0.2)
            for process in running:
                if process.poll():
                    assert process.stdout is not None
                    raise UsageError(f"--check: a job failed:\n{process.stdout.read()[-3000:]}")
    finally:
        for process in running:
            process.terminate()
            process.wait()


def _host_job(args: argparse.Namespace, shape: Shape) -> Result:
    with tempfile.TemporaryDirectory() as folder, hosts.hosts(shape) as names:
        path = Path(folder) / "machine.json"
        command = [*_module(args), "--backend", "torch", "--calibrate", str(path)]
        running = hosts.start(names, command)
        _wait(running)
        return _read(path)


def _read(path: Path) -> Result:
    steps = json.loads(path.read_text())["steps"]
    return Result(machines.load(path), {int(batch): seconds for batch, seconds in steps.items()})
