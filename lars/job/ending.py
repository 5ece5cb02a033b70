"""How a job ends when something goes wrong on one of its ranks."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator

from lars import launcher
from lars.comm.world import World
from lars.errors import EXIT_LOST_PEER, Preempted


@contextlib.contextmanager
def fail_together(world_now: Callable[[], World]) -> Iterator[None]:
    """End the whole job quickly after an error on any rank. The first cause is reported once.

    The job's exit code is the error's ``exit_code``. The user can fix errors that have one, so they are reported in
    one line. Other errors are reported with their traceback. A job that stops on request reports no error.

    Args:
        world_now: Returns the current world: a single process until the ranks have joined.
    """
    try:
        yield
    except Preempted as stop:
        world = world_now()
        if not stop.on_all_ranks:
            # When one rank exits, the launcher sends SIGTERM to the others. A SIGTERM may thus be a consequence.
            echo = stop.received == "SIGTERM"
            launcher.wait_to_report(stop.exit_code, met=world.size > 1, echo=echo)
        if world.is_root if stop.on_all_ranks else world.reports_first():
            _report(str(stop))
        (world.leave if stop.on_all_ranks else world.abort)(stop.exit_code)
    except Exception as error:
        world = world_now()
        code = EXIT_LOST_PEER if world.is_lost_peer(error) else getattr(error, "exit_code", 1)
        met = world.size > 1
        # A lost rank may still have to report the cause.
        launcher.wait_to_report(code, met=met, echo=code == EXIT_LOST_PEER)
        if world.reports_first():
            where = f" (rank {world.rank} of {world.size}, {socket.gethostname()})" if met else ""
            trace = "" if hasattr(error, "exit_code") else traceback.format_exc()
            _report(f"error{where}: {error}", trace)
        world.abort(code)


def _report(message: str, trace: str = "") -> None:
    """Print a message after a traceback. If the disk of the log is full, the job must end nevertheless."""
    with contextlib.suppress(OSError):
        print(f"{trace}{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
