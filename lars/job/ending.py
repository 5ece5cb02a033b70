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
    """End the whole job quickly after an error on any rank, with one exit code and the first cause reported once.

    The ``exit_code`` of an error becomes the job's. An error with such a code is one that the user can fix, so it is
    reported in one line. Other errors are reported with their traceback. A job that was asked to stop has no error.

    Args:
        world_now: Returns the world as far as it is known: a single process until the ranks have met.
    """
    try:
        yield
    except Preempted as stop:
        world = world_now()
        if not stop.on_all_ranks:
            # A rank that ends alone makes the launcher send SIGTERM to the others.
            echo = stop.received == "SIGTERM"
            launcher.wait_to_report(stop.exit_code, met=world.size > 1, echo=echo)
        if world.is_root or not stop.on_all_ranks:
            print(f"{os.path.basename(sys.argv[0])}: {stop}", file=sys.stderr)
        (world.leave if stop.on_all_ranks else world.abort)(stop.exit_code)
    except Exception as error:
        world = world_now()
        lost_peer = world.is_lost_peer(error)
        code = EXIT_LOST_PEER if lost_peer else getattr(error, "exit_code", 1)
        met = world.size > 1
        launcher.wait_to_report(code, met=met, echo=lost_peer)
        where = f" (rank {world.rank} of {world.size}, {socket.gethostname()})" if met else ""
        if not hasattr(error, "exit_code"):
            traceback.print_exc()
        print(f"{os.path.basename(sys.argv[0])}: error{where}: {error}", file=sys.stderr)
        world.abort(code)
