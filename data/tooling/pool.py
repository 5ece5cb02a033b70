"""The work of the data tools, spread over processes or over the ranks of MPI."""

from __future__ import annotations

import concurrent.futures
import errno
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from tqdm import tqdm

from data import DataError
from data.tooling import launcher
from data.tooling.atomic import locked, sweep
from data.tooling.limits import allow_open_files, no_shared_memory
from data.tooling.processes import end_with_parent

_FILES_PER_WORKER = 4  # pipes

Task = TypeVar("Task")
Result = TypeVar("Result")


class Pool:
    """Runs tasks in parallel, or without an executor one after the other in this process."""

    def __init__(self, executor: concurrent.futures.Executor | None) -> None:
        self._executor = executor

    def work(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], title: str
    ) -> Iterator[Result]:
        """Yield results in the order of completion, with a progress bar if stderr is a terminal.

        The first error of a task is raised here. When it leaves the pool's block, tasks that have
        not started are dropped.
        """
        results = map(function, tasks) if self._executor is None else self._spread(function, tasks)
        yield from tqdm(results, title, len(tasks), disable=not sys.stderr.isatty())

    def _spread(
        self, function: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Iterator[Result]:
        assert self._executor is not None
        # Submitting starts the workers. They inherit the signal mask, so that a Ctrl-C reaches only
        # this process.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [self._executor.submit(function, task) for task in tasks]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for future in concurrent.futures.as_completed(futures):
            yield future.result()


class LauncherError(DataError):
    """A launcher started several tasks that cannot share the work."""

    exit_code = 2


def refuse_separate_tasks(mpi_size: int, tasks: int, name: str) -> None:
    """Raise LauncherError if MPI does not see the tasks that the launcher started.

    Each of them would do all of the work, and write over the files of the others.

    Args:
        mpi_size: Number of ranks that MPI sees.
        tasks: Number of tasks that the launcher started.
        name: The launcher's command.
    """
    if mpi_size == 1 < tasks:
        raise LauncherError(
            f"{name} started {tasks} tasks, but each of them sees only itself: {name} does not work "
            "with the MPI that mpi4py uses; use that MPI's own mpirun, or srun --mpi=pmix, or start "
            "one task with --workers"
        )


@contextmanager
def pool(workers: int | None) -> Iterator[Pool | None]:
    """Make a pool for the block.

    Args:
        workers: Number of processes; None: one for each available CPU; 0: do the work in this
            process. Under an MPI launcher the other ranks do the work instead.

    Yields:
        The pool. Under a launcher it is None on all ranks except 0; they run tasks until the block
        ends on rank 0.

    Raises:
        LauncherError: A launcher started several tasks, but they cannot share the work.
    """
    tasks, name = launcher.tasks()
    if tasks > 1:
        with _mpi_ranks(tasks, name) as ranks:
            yield ranks
        return
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers == 0:
        yield Pool(None)
        return
    # Spawned, not forked: this process may have other threads.
    context = multiprocessing.get_context("spawn")
    allow_open_files(workers, _FILES_PER_WORKER)
    try:
        executor = concurrent.futures.ProcessPoolExecutor(workers, context, end_with_parent)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise no_shared_memory(f"--workers {workers}") from error
    with executor as processes, _dropping(processes):
        yield Pool(processes)


@contextmanager
def _mpi_ranks(tasks: int, name: str) -> Iterator[Pool | None]:
    """Make a pool of the MPI ranks; None on all of them except 0."""
    if name == "torchrun":  # its tasks do not use MPI
        raise LauncherError(
            f"torchrun started {tasks} tasks, but the data tools do not work with it; start one "
            "task with --workers, or use mpirun"
        )
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:
        raise LauncherError(
            f"{name} started {tasks} tasks, but mpi4py cannot be imported ({error}); "
            "run ./launch/setup.sh, or start one task with --workers"
        ) from error
    refuse_separate_tasks(MPI.COMM_WORLD.size, tasks, name)
    with MPICommExecutor() as ranks:
        if ranks is None:
            yield None
        else:
            with _dropping(ranks):  # type: ignore[arg-type]
                yield Pool(ranks)  # type: ignore[arg-type]


@contextmanager
def _dropping(executor: concurrent.futures.Executor) -> Iterator[None]:
    """If the block fails, drop the tasks that have not started; after Ctrl-C, end the others too."""
    try:
        yield
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()  # its unfinished file has a temporary name and will be swept
        raise
    except BaseException:
        executor.shutdown(cancel_futures=True)
        raise


class FolderTask(Protocol):
    """A class folder to make."""

    @property
    def folder(self) -> str:
        """Return its path."""
        ...


Folder = TypeVar("Folder", bound=FolderTask)


def make_folders(
    root: str, tasks: Sequence[Folder], make: Callable[[Folder], int], pool: Pool
) -> None:
    """Make the class folders under `root` that do not exist yet, and print how many.

    `make` makes one folder, completely or not at all, and returns its number of images.
    """
    with locked(root):
        sweep(root)
        missing = [
            task for task in tasks if not (os.path.isdir(task.folder) and os.listdir(task.folder))
        ]
        images = sum(pool.work(make, missing, "classes"))
    print(f"{root}: {len(tasks)} classes, {len(missing)} of them written now ({images:,} images)")
