"""From samples to batches: the loaders of every source that is read sample by sample.

This is what a worker process imports: torch, numpy and the decoder, nothing heavier.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, get_worker_info

from data import Batch, DataError
from data.prefetch import batch_device, one_ahead
from data.sampler import Indices, Order, sample_seeds, shard
from data.transforms import Box, Choose, Pixels, cut, whole
from data.workers import end_with_parent, start_forkserver

Found = TypeVar("Found")

# Batches that each worker makes ahead; torch's default.
_PREFETCH = 2

# Where torch keeps what workers send, by either of its sharing strategies.
_SHARED_MEMORY = "/dev/shm"


class Samples(Protocol):
    """Images by number, as a source finds them. Sent once to each worker process."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def read(self, index: int, choose: Choose) -> tuple[Pixels, int]:
        """Return the chosen box of one image, uint8 (height, width, 3), and its label.

        Raises:
            DataError: It cannot be had; the message names it.
        """
        ...


class CountedSamples(Samples, Protocol):
    """Samples that know how many classes there are, and which samples they are."""

    num_classes: int

    @property
    def fingerprint(self) -> str:
        """Return a short hash of the samples' names and labels in order."""
        ...


class ListedSamples(CountedSamples, Protocol):
    """Samples of which a list of the user's leaves some out."""

    @property
    def unmatched(self) -> Sequence[str]:
        """Return the lines of the list that name no sample."""
        ...


class Transform(Protocol):
    """From one image to the tensor that goes into the batch."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        ...

    def box(self, height: int, width: int, generator: Generator) -> Box:
        """Return the box of an image that the transform needs; drawn before anything else."""
        ...

    def __call__(self, pixels: Pixels, generator: Generator) -> Tensor:
        """Transform that box of one image; what is random comes from `generator`."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """What the sampler asks a worker for."""

    epoch: int
    indices: Indices


class Reader:
    """Reads whole micro-batches: the data set that torch's DataLoader sees.

    Attributes:
        samples: Where the images come from.
        transform: What is done to each.
        seed: Of the run; a sample's augmentation is seeded by (seed, epoch, index).
        on_bad_image: ``error``: raise; ``skip``: the micro-batch gets smaller; ``replace``: the
            next sample that can be read takes the place, so that all micro-batches stay full.
        max_bad_images: To try in place of one.
    """

    def __init__(
        self,
        samples: Samples,
        transform: Transform,
        seed: int = 0,
        on_bad_image: str = "error",
        max_bad_images: int = 0,
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed
        self.on_bad_image = on_bad_image
        self.max_bad_images = max_bad_images

    def __getitems__(self, wanted: MicroBatch) -> tuple[Batch, list[str]] | DataError:
        """Return a micro-batch and what was bad in it, or the error for the trainer to raise."""
        try:
            return self.read(wanted)
        except DataError as error:
            return error

    def read(self, wanted: MicroBatch) -> tuple[Batch, list[str]]:
        """Return one micro-batch, and the messages about images that could not be read."""
        images = _empty_images(len(wanted.indices), self.transform.shape)
        labels = torch.empty(len(wanted.indices), dtype=torch.int64)
        generator = Generator()
        seeds = sample_seeds(self.seed, wanted.epoch, wanted.indices)
        count, bad = 0, []
        for index, seed in zip(wanted.indices.tolist(), seeds.tolist(), strict=True):
            sample, problems = by_policy(
                functools.partial(self._read_one, wanted.epoch, generator, seed),
                index,
                len(self.samples),
                self.on_bad_image,
                self.max_bad_images,
            )
            bad += problems
            if sample is None:
                continue
            pixels, labels[count] = sample
            images[count].copy_(self.transform(pixels, generator))
            count += 1
        return (images[:count], labels[:count]), bad

    def _read_one(
        self, epoch: int, generator: Generator, seed: int, index: int
    ) -> tuple[Pixels, int]:
        generator.manual_seed(seed)  # anew for one that takes the place of another
        choose = functools.partial(self.transform.box, generator=generator)
        if epoch > 0 and self.on_bad_image == "error":
            return self.samples.read(index, choose)
        # A box alone may hide damage to the image. In the first epoch all of every image is seen, which ends the job
        # before days of training; where bad images are left out, every epoch has to find the same ones.
        pixels, label = self.samples.read(index, whole)
        return cut(pixels, choose(*pixels.shape[:2])), label


def by_policy(
    read: Callable[[int], Found],
    index: int,
    total: int,
    on_bad_image: str,
    max_bad_images: int,
) -> tuple[Found | None, list[str]]:
    """Read sample `index` of `total`, or do what the policy says if that cannot be done.

    Returns:
        What was read (None: leave the sample out), and a message for each that was not.

    Raises:
        DataError: The policy is ``error``, more than `max_bad_images` in a row cannot be read,
            or nothing at all can.
    """
    problems: list[str] = []
    for candidate in range(index, index + total):
        try:
            return read(candidate % total), problems
        except DataError as error:
            if on_bad_image == "error":
                raise
            problems.append(str(error))
        if on_bad_image == "skip":
            return None, problems
        if len(problems) > max_bad_images:  # all of them, if a file system went away
            raise _too_many(max_bad_images, problems)
    raise DataError("no image can be read")


def _too_many(limit: int, problems: list[str]) -> DataError:
    return DataError(
        f"more than --max-bad-images {limit} images cannot be read; "
        f"look for all of them with python -m data.check. The last: {problems[-1]}"
    )


class BadImages:
    """The messages about images that could not be read, each once, up to a limit."""

    def __init__(self, limit: int) -> None:
        self.messages: list[str] = []
        self._limit = limit

    def add(self, problems: list[str]) -> None:
        """Take note; raise DataError beyond the limit."""
        self.messages += [text for text in dict.fromkeys(problems) if text not in self.messages]
        if len(self.messages) > self._limit:
            raise _too_many(self._limit, problems)


def _empty_images(count: int, shape: tuple[int, ...]) -> Tensor:
    """Make room for `count` images in channels-last memory.

    In a worker it is memory shared with the trainer from the start, so that nothing is copied to
    send it; torch's own collation does the same.
    """
    numel = count * math.prod(shape)
    if get_worker_info() is None:
        flat = torch.empty(numel, dtype=torch.uint8)
    else:
        flat = torch.tensor((), dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(numel))
    channels, height, width = shape[-3:]
    last = flat.view(count, *shape[:-3], height, width, channels)
    return last.movedim(-1, -3)


def _as_is(batch: Any) -> Any:
    return batch


class TrainSampler:
    """The micro-batches that are wanted next.

    The loader sets epoch and first step before each pass.
    """

    def __init__(self, order: Order, rank: int, size: int) -> None:
        self.order, self.rank, self.size = order, rank, size
        self.epoch = self.first_step = 0

    def __iter__(self) -> Iterator[MicroBatch]:
        for indices in self.order.epoch(self.epoch, self.first_step, self.rank, self.size):
            yield MicroBatch(self.epoch, indices)


class ValSampler:
    """One rank's share of the validation images."""

    def __init__(self, samples: int, batch_size: int, rank: int, size: int) -> None:
        self.arguments = samples, batch_size, rank, size

    def __iter__(self) -> Iterator[MicroBatch]:
        for indices in shard(*self.arguments):
            yield MicroBatch(0, indices)


def check_shared_memory(needed: int, workers: int, flag: str) -> None:
    """Raise DataError if `needed` bytes of batches on their way do not fit into shared memory.

    A worker that writes beyond it dies of a bus error, in the middle of the run. What other ranks
    on this host need is not known here: each looks at its own batches.
    """
    try:
        memory = os.statvfs(_SHARED_MEMORY)
    except OSError:  # not Linux
        return
    free = memory.f_bavail * memory.f_frsize
    if needed > free:
        raise DataError(
            f"--workers {workers} needs {needed / 1e6:,.0f} MB of {_SHARED_MEMORY} for the batches "
            f"on their way, and {free / 1e6:,.0f} MB are free; lower --workers or {flag}, or "
            "enlarge it (docker run --shm-size, mount -o remount,size=)"
        )


def _begin_worker(worker: int) -> None:
    """Prepare a worker process: it ends with the trainer, whose GPU no library opens here."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    end_with_parent(worker)


def _torch_loader(
    reader: Reader, sampler: Iterable[MicroBatch], workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """Make the one DataLoader of a run: its workers live across epochs."""
    if workers:
        start_forkserver()  # where the script has not done it already
    return DataLoader(
        reader,  # type: ignore[arg-type]
        batch_sampler=sampler,  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=_PREFETCH if workers else None,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_begin_worker,
        multiprocessing_context="forkserver" if workers > 0 else None,
    )


class _Loader:
    """Batches of a DataLoader, and the record of what was bad in them."""

    def __init__(
        self,
        reader: Reader,
        sampler: Iterable[MicroBatch],
        batch_size: int,
        flag: str,
        workers: int,
        max_bad_images: int,
    ) -> None:
        if workers:
            batches = workers * _PREFETCH + 1  # and the one in use
            batch = batch_size * math.prod(reader.transform.shape)
            check_shared_memory(batches * batch, workers, flag)
        self._bad = BadImages(max_bad_images)
        self._device = batch_device()
        self._loader: DataLoader[Any] | None = _torch_loader(
            reader, sampler, workers, pin_memory=self._device.type == "cuda"
        )

    @property
    def bad_images(self) -> list[str]:
        """One message for each image that could not be read so far, on this rank."""
        return self._bad.messages

    def _batches(self) -> Iterator[Batch]:
        yield from one_ahead(self._on_the_host(), self._device)

    def _on_the_host(self) -> Iterator[Batch]:
        if self._loader is None:
            raise RuntimeError("the loader is closed")
        for result in self._loader:
            if isinstance(result, DataError):
                # A new one: `result` itself would hold this frame, which holds `result`. Workers
                # in such a cycle are stopped by the collector alone, after their queues, 5 s each.
                raise DataError(*result.args)
            batch, problems = result
            self._bad.add(problems)
            yield batch


class TrainLoader(_Loader):
    """This rank's part of every epoch, read sample by sample. The contract is in `data`."""

    def __init__(
        self,
        reader: Reader,
        order: Order,
        rank: int,
        size: int,
        workers: int,
        max_bad_images: int = 0,
    ) -> None:
        self._sampler = TrainSampler(order, rank, size)
        super().__init__(
            reader, self._sampler, order.batch_size, "--batch-size", workers, max_bad_images
        )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of `epoch` from optimizer step `first_step` on."""
        self._sampler.epoch, self._sampler.first_step = epoch, first_step
        yield from self._batches()

    def close(self) -> None:
        """Stop the worker processes; torch does it when the DataLoader goes."""
        self._loader = None


class ValLoader(_Loader):
    """This rank's share of the validation images, in order; iterate it again and again."""

    def __init__(
        self,
        reader: Reader,
        batch_size: int,
        rank: int,
        size: int,
        workers: int,
        max_bad_images: int = 0,
    ) -> None:
        sampler = ValSampler(len(reader.samples), batch_size, rank, size)
        super().__init__(reader, sampler, batch_size, "--val-batch-size", workers, max_bad_images)

    def __iter__(self) -> Iterator[Batch]:
        """Yield (images, labels)."""
        yield from self._batches()
