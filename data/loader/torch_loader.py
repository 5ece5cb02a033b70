"""The loaders of every source that is read sample by sample, on torch's DataLoader.

This is the module that the fork server imports for its workers. It must not load torchvision,
Horovod or MPI.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from data import Batch, DataError, SetError, Share
from data.loader.bad_images import BadImages
from data.loader.order import Blocks
from data.loader.prefetch import batch_device, one_ahead
from data.loader.reader import Reader
from data.loader.sampler import MicroBatch, TrainSampler, ValSampler, epochs_from
from data.loader.workers import start_forkserver
from data.tooling.limits import (
    SHARED_MEMORY,
    TOO_MANY_FILES,
    free_shared_memory,
    in_units,
    no_shared_memory,
    too_many_open_files,
)
from data.tooling.processes import end_when_parent_asks, end_with_parent

# Batches that each worker prepares ahead; torch's default.
_PREFETCH = 2


def check_shared_memory(needed: int, workers: int, flag: str) -> None:
    """Raise SetError if `needed` bytes of prefetched batches do not fit into shared memory.

    A worker that writes beyond it dies of a bus error, in the middle of the run. A rank does not
    know what the other ranks on its host need, so each one checks its own batches.
    """
    free = free_shared_memory()
    if free is not None and needed > free:
        raise SetError(
            f"--workers {workers} needs {in_units(needed)} of {SHARED_MEMORY} for prefetched "
            f"batches, but only {in_units(free)} are free; lower --workers or {flag}, or "
            "enlarge it (docker run --shm-size, mount -o remount,size=)"
        )


def _begin_worker(worker: int) -> None:
    """Prepare a worker process: it ends with the trainer, and no library opens the GPU in it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    end_with_parent(worker)
    end_when_parent_asks()


def _unchanged(batch: Any) -> Any:
    return batch


def _torch_loader(
    reader: Reader, sampler: Iterable[MicroBatch], workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """Make the one DataLoader of a run. Its workers live across epochs."""
    if workers:
        start_forkserver()  # unless the script has already done it
    return DataLoader(
        reader,  # type: ignore[arg-type]
        batch_sampler=sampler,  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=_PREFETCH if workers else None,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_begin_worker,
        multiprocessing_context="forkserver" if workers > 0 else None,
    )


class _Loader:
    """Batches of a DataLoader, and the record of the bad images in them."""

    def __init__(
        self,
        reader: Reader,
        sampler: Iterable[MicroBatch],
        batch_size: int,
        flag: str,
        workers: int,
    ) -> None:
        if workers:
            batches = workers * _PREFETCH + 1  # the last is the one in use
            batch = batch_size * math.prod(reader.transform.shape)
            check_shared_memory(batches * batch, workers, flag)
        self._bad = BadImages(reader.max_bad_images)
        self._device = batch_device()
        self._loader: DataLoader[Any] | None = _torch_loader(
            reader, sampler, workers, pin_memory=self._device.type == "cuda"
        )
        self._running: Generator[Batch] | None = None

    @property
    def bad_images(self) -> list[str]:
        """One message for each image that this rank could not read so far."""
        return self._bad.messages

    def close(self) -> None:
        """Stop the worker processes, even in the middle of an epoch."""
        # torch stops them when the DataLoader and its iterator go away. A generator that is
        # suspended in the middle of an epoch would keep the iterator alive.
        if self._running is not None:
            self._running.close()
        self._running = self._loader = None

    def _batches(self) -> Iterator[Batch]:
        self._running = one_ahead(self._on_the_host(), self._device)
        yield from self._running

    def _on_the_host(self) -> Iterator[Batch]:
        if self._loader is None:
            raise RuntimeError("the loader is closed")
        for result in self._results():
            if isinstance(result, DataError):
                # A new error: `result` itself would refer to this frame, which refers to `result`.
                # Only the garbage collector frees workers in such a cycle. It does so after their
                # queues are gone, which takes 5 s for each worker.
                raise type(result)(*result.args)
            batch, problems = result
            self._bad.add(problems)
            yield batch

    def _results(self) -> Iterator[Any]:
        """Yield what the DataLoader yields; name the limit if the machine stops it."""
        assert self._loader is not None
        try:
            yield from self._loader
        except (OSError, RuntimeError) as error:
            limit = _limit_reached(error)
            if limit is None:
                raise
            raise limit from error


def _limit_reached(error: Exception) -> SetError | None:
    """Return the error that names the limit of the machine behind one of torch's errors."""
    text = str(error)
    if getattr(error, "errno", None) in TOO_MANY_FILES or "Too many open files" in text:
        return too_many_open_files()
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        return no_shared_memory("a worker process")
    return None


class TrainLoader(_Loader):
    """This rank's part of the training samples. The contract is in `data`.

    `block` is the number of consecutive samples that are shuffled as one, or the first sample of
    each such block. `repeats` is the number of augmented copies of each sample in its step.
    """

    def __init__(
        self, reader: Reader, share: Share, workers: int, block: Blocks = 1, repeats: int = 1
    ) -> None:
        self._sampler = TrainSampler(len(reader.samples), share, block, repeats)
        super().__init__(reader, self._sampler, share.batch_size, "--batch-size", workers)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of `epoch` from optimizer step `first_step` on."""
        self._sampler.epoch, self._sampler.first_step = epoch, first_step
        yield from self._batches()

    def batches_from(self, step: int) -> Iterator[Batch]:
        """Yield micro-batches from global optimizer step `step` on, without end."""
        return epochs_from(self.epoch, self._sampler.order.steps, step)


class ValLoader(_Loader):
    """This rank's share of the validation images, in order; it can be iterated repeatedly."""

    def __init__(self, reader: Reader, share: Share, workers: int) -> None:
        sampler = ValSampler(len(reader.samples), share)
        super().__init__(reader, sampler, share.val_batch_size, "--val-batch-size", workers)

    def __iter__(self) -> Iterator[Batch]:
        """Yield (images, labels)."""
        yield from self._batches()
