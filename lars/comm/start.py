"""Joining the ranks that the launcher started."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import Future

from lars import launcher
from lars.comm.world import World
from lars.errors import UsageError
from lars.names import BACKENDS


def choose_backend(
    wanted: str = "auto", environment: Mapping[str, str] = os.environ
) -> tuple[str, str]:
    """The backend of this job, and why it was chosen.

    Args:
        wanted: A name in `lars.names.BACKENDS`, or "auto". auto takes Horovod if the launcher offers MPI and Horovod is
            installed, and torch.distributed otherwise.
        environment: Environment of this process.
    """
    if wanted != "auto":
        return wanted, f"--backend {wanted}"
    _, name = launcher.tasks(environment)
    if name == "torchrun":
        return "torch", "torchrun started the job"
    if name == "srun" and not any(key.startswith(("PMIX_", "PMI_")) for key in environment):
        return "torch", "srun started the job without --mpi=pmix"
    if importlib.util.find_spec("horovod"):
        return "horovod", f"{name} started the job"
    return "torch", "Horovod is not installed"


def check(
    environment: Mapping[str, str] = os.environ, *, backend: str = "auto", bfloat16: bool = False
) -> None:
    """Refuse what the backend can never do, before any time is spent.

    Args:
        environment: Environment of this process.
        backend: See `choose_backend`.
        bfloat16: Whether gradients are to be exchanged as bfloat16.

    Raises:
        UsageError: The backend cannot join tasks of this launcher, or cannot sum bfloat16.
    """
    tasks, name = launcher.tasks(environment)
    if tasks == 1:
        return
    module = importlib.import_module(BACKENDS[choose_backend(backend, environment)[0]])
    if name in module.CANNOT_JOIN:
        raise UsageError(
            f"--backend {backend}: {name} started {tasks} tasks, but {module.NAME} cannot join them; use --backend "
            f"auto, or start them with launch/mpirun.sh -np {tasks} {os.path.basename(sys.argv[0])} ..."
        )
    if bfloat16 and not module.SUMS_BFLOAT16:
        raise UsageError(
            f"--bf16-allreduce: {module.NAME} cannot sum bfloat16; add --backend torch, or use --fp16-allreduce"
        )


def join(
    environment: MutableMapping[str, str] = os.environ,
    *,
    backend: str = "auto",
    on_cpu: bool = False,
    stall_seconds: float = 0.0,
) -> World:
    """Join the other ranks. Without a launcher, return the single-process world and load no backend.

    Args:
        environment: Environment of this process.
        backend: See `choose_backend`.
        on_cpu: Whether the gradients are on CPUs.
        stall_seconds: How long a rank may keep the others waiting; 0: no limit.

    Raises:
        UsageError: A launcher started several tasks, but this process would train alone. Each task would then run
            the whole job, and they would overwrite each other's results.
    """
    if not launcher.is_task(environment):
        return World()
    tasks, name = launcher.tasks(environment)
    module = importlib.import_module(BACKENDS[choose_backend(backend, environment)[0]])
    try:
        # A backend waits for the other ranks in C. In a thread, it does not keep this process from handling a signal.
        world: World = _in_thread(
            lambda: module.join(environment, on_cpu=on_cpu, stall_seconds=stall_seconds)
        )
    except ImportError as error:
        if tasks > 1:
            raise UsageError(
                f"{name} started {tasks} tasks, but {module.NAME} cannot be imported ({error}); "
                f"{module.INSTALL}, or start one task"
            ) from error
        return World()
    if world.size == 1 and tasks > 1:
        raise UsageError(
            f"{name} started {tasks} tasks, but each of them sees only itself: {name} {module.ALONE}"
        )
    if world.size == 1 and not module.COUNTS_TASKS and launcher.hides_tasks(environment):
        raise UsageError(
            f"a launcher started this process whose tasks {module.NAME} cannot count; start the ranks with torchrun, "
            "or install Horovod: ./launch/setup.sh --horovod"
        )
    return world


def _in_thread(call: Callable[[], World]) -> World:
    """Return what a function returns, or raise what it raises. It runs in another thread."""
    outcome: Future[World] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True, name="join").start()
    return outcome.result()
