"""Runs a part in a process of its own, so that a crash or a hang of one part does not touch the others."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from launch.acceptance.budget import Budget
from launch.acceptance.rows import Row, failed


def run_part(
    module: str, seconds: float, log: Path, environment: Mapping[str, str] = os.environ
) -> Iterator[Row]:
    """Yield the rows of a part as it finds them. A crash or a hang is a failed row.

    The process is forked, so that it need not load torch again. It must not have used CUDA, MPI or threads before.

    Args:
        module: Name of a module with a function ``run(budget)`` that yields rows.
        seconds: Time after which the process and its children are ended.
        log: The file for what the part prints.
        environment: Environment of the process.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_child, args=(module, seconds, log, dict(environment), sender))
    process.start()
    sender.close()
    deadline = time.monotonic() + seconds
    try:
        yield from _received(receiver, deadline)
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            yield failed("time", f"took longer than its {seconds:.0f} s and was ended; see {log}")
        elif process.exitcode:
            yield failed("process", f"{_ending(process.exitcode)}; {_last_line(log)}; see {log}")
    finally:
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # also its children, which may remain
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # it may not have made its group yet
        process.join()
        receiver.close()


def _received(receiver: Connection, deadline: float) -> Iterator[Row]:
    """Yield rows until the process ends or its time is up."""
    while (left := deadline - time.monotonic()) > 0:
        if receiver.poll(left):
            try:
                yield receiver.recv()
            except EOFError:
                return


def _child(
    module: str, seconds: float, log: Path, environment: dict[str, str], sender: Connection
) -> None:
    os.setsid()  # the parent ends the whole group
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    with tempfile.TemporaryDirectory(prefix="acceptance-") as folder:
        for row in importlib.import_module(module).run(Budget(seconds, Path(folder))):
            sender.send(row)


def _ending(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().split("\n")
    return lines[-1].strip()[:200] or "it printed nothing"
