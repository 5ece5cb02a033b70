"""Check this machine, or all the ranks that a launcher started, and say how to fix what is wrong.

"python -m launch.doctor" checks this machine. "launch/mpirun.sh -np 8 -m launch.doctor" checks all ranks and the
network between them. So do srun and torchrun.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.doctor.checks import ALLREDUCE_BYTES, CHECKS, WRONG, Row, check_allreduce
from launch.doctor.facts import Facts, collect, hosts_of

MEETING_SECONDS = 120  # how long the ranks may take to find each other


def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks on all ranks; the root prints the result. Returns 1 on every rank if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m launch.doctor", description=__doc__)
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="a folder of images or records that all ranks must be able to read",
    )
    parser.add_argument(
        "--log-dir", type=Path, default=Path("logs"), help="where runs will be written"
    )
    options = parser.parse_args(argv)

    import torch

    from lars import launcher
    from lars.comm import start
    from lars.comm.world import World
    from lars.errors import UsageError

    advice = "check that it is the right network (launch/mpirun.sh --interface) and that the hosts can reach each other"
    world, world_error = World(), ""
    with time_limit(MEETING_SECONDS, "meeting the other ranks", advice):
        try:
            world = start.join(on_cpu=not torch.cuda.is_available())
        except (UsageError, RuntimeError) as error:
            world_error = str(error).split("\n")[0]
        mine = collect(world, options.log_dir, options.data_dir)
        mine.world_error = world_error
        ranks = world.all_gather_object(mine, "doctor.facts")
        rows = [check(ranks) for check in CHECKS]
        correct, seconds = measure_allreduce(world) if world.size > 1 else (True, [])
        correct = all(world.all_gather_object(correct, "doctor.correct"))
    rows.append(check_allreduce(correct, seconds, world.size, len(hosts_of(ranks))))
    if world.is_root and (not world_error or launcher.rank() == 0):
        print(f"{rank_table(ranks)}\n\n{report(rows)}", flush=True)
    return 1 if any(row.state == WRONG for row in rows) else 0


def measure_allreduce(world: Any, repeats: int = 3) -> tuple[bool, list[float]]:
    """Sum a large tensor over the ranks, on the device that would hold the gradients.

    Returns:
        Whether every sum was correct on this rank, and the seconds that each took.
    """
    import torch

    device = torch.device("cpu")
    if world.local_rank < torch.cuda.device_count():
        device = torch.device("cuda", world.local_rank)
    values = torch.full((ALLREDUCE_BYTES // 4,), world.rank + 1.0, device=device)
    correct, seconds = True, []
    for i in range(repeats + 1):
        start = time.perf_counter()
        total = world.all_reduce(values, f"doctor.allreduce.{i}")
        correct &= bool((total == world.size * (world.size + 1) / 2).all())
        seconds.append(time.perf_counter() - start)
    return correct, seconds[1:]  # the first one sets up the connections


@contextmanager
def time_limit(seconds: float, what: str, advice: str) -> Iterator[None]:
    """Exit with `advice` if the block takes longer; a rank that waits for others cannot be interrupted otherwise."""

    def give_up() -> None:
        host = socket.gethostname()
        print(f"doctor: {what} took over {seconds:g} s on {host}; {advice}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def rank_table(ranks: Sequence[Facts]) -> str:
    """A table with the host, local rank, GPU, threads and CPUs of every rank."""
    lines: list[tuple[str, ...]] = [("rank", "host", "local rank", "GPU", "threads", "CPUs")]
    for facts in ranks:
        gpu = f"{facts.local_rank}: {facts.gpu}" if facts.gpu else "none"
        cells = (facts.rank, facts.host, facts.local_rank, gpu, facts.threads, ranges(facts.cpus))
        lines.append(tuple(str(cell) for cell in cells))
    return aligned(lines)


def report(rows: Sequence[Row]) -> str:
    """A table of the checks, with the fix below each row that needs one."""
    lines = aligned([(row.state, row.what, row.found) for row in rows]).split("\n")
    return "\n".join(
        line + (f"\n         -> {row.fix}" if row.fix else "")
        for line, row in zip(lines, rows, strict=True)
    )


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def aligned(lines: Sequence[tuple[str, ...]]) -> str:
    """Format lines of cells as columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
