"""Work of the data tools spread over processes, or over the ranks of mpirun."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from tqdm import tqdm

from data.atomic import alone, sweep
from data.workers import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")

# Set by Open MPI, and by MPICH, Intel MPI and Slurm.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class Pool:
    """Does tasks side by side; without an executor one after the other in this process."""

    def __init__(self, executor: concurrent.futures.Executor | None) -> None:
        self._executor = executor

    def work(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], title: str
    ) -> Iterator[Result]:
        """Yield results as they come, under a progress bar if stderr is a terminal.

        The first error of a task is raised here; when it leaves the pool's block, tasks not yet
        begun are dropped.
        """
        results = map(function, tasks) if self._executor is None else self._spread(function, tasks)
        yield from tqdm(results, title, len(tasks), disable=not sys.stderr.isatty())

    def _spread(
        self, function: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Iterator[Result]:
        assert self._executor is not None
        # Submitting starts the workers, which inherit what is blocked: a Ctrl-C is for this process.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [self._executor.submit(function, task) for task in tasks]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for future in concurrent.futures.as_completed(futures):
            yield future.result()


def under_mpirun() -> bool:
    """Say whether there are other ranks."""
    return any(int(os.environ.get(name, "1")) > 1 for name in _SIZES)


@contextmanager
def pool(workers: int | None) -> Iterator[Pool | None]:
    """Make a pool for the block.

    Args:
        workers: Processes; None: as many as there are CPUs allotted; 0: none, all is done here.
            Under mpirun the other ranks do the work instead.

    Yields:
        The pool; under mpirun None on all ranks but 0, which do tasks until the block ends on 0.
    """
    if under_mpirun():
        from mpi4py.futures import MPICommExecutor

        with MPICommExecutor() as ranks:
            if ranks is None:
                yield None
            else:
                with _dropping(ranks):  # type: ignore[arg-type]
                    yield Pool(ranks)  # type: ignore[arg-type]
        return
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers == 0:
        yield Pool(None)
        return
    # Spawned, not forked: other threads may be running in this process.
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(workers, context, end_with_parent) as processes,
        _dropping(processes),
    ):
        yield Pool(processes)


@contextmanager
def _dropping(executor: concurrent.futures.Executor) -> Iterator[None]:
    """Drop the tasks not yet begun if the block fails; after Ctrl-C those begun as well."""
    try:
        yield
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()  # what it is writing has no name yet, and will be swept
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
    """Make the class folders under `root` that are not there yet, and say how many.

    `make` makes one, whole or not at all, and returns its number of images.
    """
    with alone(root):
        sweep(root)
        left = [
            task for task in tasks if not (os.path.isdir(task.folder) and os.listdir(task.folder))
        ]
        images = sum(pool.work(make, left, "classes"))
    print(f"{root}: {len(tasks)} classes, {len(left)} of them written now ({images:,} images)")
