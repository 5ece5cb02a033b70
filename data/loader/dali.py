"""Micro-batches decoded and resized by DALI, on the GPU if there is one.

We tell DALI which images to decode and where to crop them. The order of the samples, their boxes and
their flips are those of `data.loader.torch_loader`, drawn by the same code from the same seeds. So
the shuffle is a full permutation (DALI's own TFRecord reader shuffles within a buffer only), the
last step is equally short on all ranks, every validation image comes once, and (epoch, step) is the
entire state of the data, with any number of ranks. Only the pixels differ, by DALI's decoder and
resize filter. Images that DALI might read differently, or not at all, are decoded here and handed
over as pixels.

This was run with DALI 2.0.0 and 2.4.0. The device is the process's current GPU if the process has
initialised CUDA.
"""

from __future__ import annotations

import copy
import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray

from data import Batch, DataError, Share
from data.loader.bad_images import BadImages, read_by_policy
from data.loader.dali_graph import Geometry, Numbers, build_pipeline
from data.loader.order import Blocks, sample_seeds
from data.loader.prefetch import batch_device, one_ahead
from data.loader.sampler import MicroBatch, TrainSampler, ValSampler, epochs_from
from data.pixels.boxes import Pixels
from data.pixels.decode import decode, jpeg_size
from data.samples import EncodedSamples

# Micro-batches that are read ahead of the one that DALI takes next.
_READ_AHEAD = 4


@dataclass
class _Prepared:
    """One micro-batch in the form that DALI takes."""

    epoch: int
    indices: list[int] = field(default_factory=list)
    encoded: list[NDArray[np.uint8]] = field(default_factory=list)
    numbers: list[Numbers] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class _Stopped(Exception):
    """DALI stopped at images; the argument is the set of their (epoch, index)."""


class _DaliLoader:
    """Micro-batches from one DALI pipeline, which lives as long as the loader."""

    def __init__(
        self,
        samples: EncodedSamples,
        geometry: Geometry,
        batch_size: int,
        seed: int,
        threads: int,
        on_bad_image: str,
        max_bad_images: int,
    ) -> None:
        self._samples = samples
        self._geometry = geometry
        self._batch_size = batch_size
        self._threads = max(threads, 1)
        self._seed = seed
        self._on_bad_image = on_bad_image
        self._max_bad_images = max_bad_images
        self._bad = BadImages(max_bad_images)
        # (epoch, index) of images at which DALI stopped; they are decoded here. They are kept for
        # each epoch because whether DALI stops depends on the box, and the pixels of an epoch must
        # not depend on the epochs before it.
        self._decoded_here: set[tuple[int, int]] = set()
        self._local = threading.local()
        self._readers = ThreadPoolExecutor(self._threads)
        self._device = batch_device()
        self._pipeline: Pipeline | None = None
        self._source: Iterator[_Prepared] = iter(())
        self._pending: deque[_Prepared] = deque()
        self._running: Generator[Batch] | None = None
        self._closed = False

    @property
    def bad_images(self) -> list[str]:
        """One message for each image that could not be read so far."""
        return self._bad.messages

    def close(self) -> None:
        """Free DALI's memory and threads, even in the middle of an epoch."""
        if self._running is not None:
            self._running.close()
        self._running = self._pipeline = None
        self._closed = True
        self._readers.shutdown(cancel_futures=True)

    def _batches(self, sampler: Iterable[MicroBatch]) -> Iterator[Batch]:
        """Yield the micro-batches of one pass, including empty ones."""
        if self._closed:
            raise RuntimeError("the loader is closed")
        self._running = one_ahead(self._passes(sampler), self._device)
        yield from self._running

    def _passes(self, sampler: Iterable[MicroBatch]) -> Iterator[Batch]:
        remaining = deque(sampler)
        while remaining:
            try:
                for batch in self._pass(list(remaining)):
                    remaining.popleft()
                    yield batch
                if remaining:
                    raise RuntimeError(f"DALI stopped {len(remaining)} micro-batches early")
            except _Stopped as stopped:
                # A pipeline cannot continue after an error. A new one starts at the same place.
                self._decoded_here |= stopped.args[0]

    def _pass(self, micro_batches: list[MicroBatch]) -> Iterator[Batch]:
        """Yield batches until the end, or until DALI stops at an image."""
        if self._pipeline is None:
            self._pipeline = build_pipeline(
                self._geometry, self._batch_size, self._threads, self._device, self._next
            )
        self._source = self._read_ahead(micro_batches)
        self._pending.clear()
        finished = False
        try:
            while True:
                try:
                    (images,) = self._pipeline.run()
                except StopIteration:
                    break
                except RuntimeError as error:
                    unreadable = set(self._unreadable()) - self._decoded_here
                    if not unreadable:
                        raise DataError(f"DALI stopped: {error}") from error
                    raise _Stopped(unreadable) from error
                yield from self._empty_batches()
                yield self._batch(images, self._pending.popleft())
            yield from self._empty_batches()
            self._pipeline.reset()
            finished = True
        finally:
            if not finished:  # DALI holds micro-batches that nobody will ask for
                self._pipeline = None

    def _batch(self, images: Any, prepared: _Prepared) -> Batch:
        self._bad.add(prepared.problems)
        count, side = len(prepared.labels), self._geometry.size
        out = torch.empty((count, side, side, 3), dtype=torch.uint8, device=self._device)
        if count:
            stream = torch.cuda.current_stream() if self._device.type == "cuda" else None
            feed_ndarray(images.as_tensor(), out, cuda_stream=stream)
        return out.permute(0, 3, 1, 2), torch.tensor(prepared.labels, dtype=torch.int64)

    def _empty_batches(self) -> Iterator[Batch]:
        while self._pending and not self._pending[0].labels:
            yield self._batch(None, self._pending.popleft())

    def _next(self) -> tuple[list[Any], ...]:
        """Return what DALI asks for: the next micro-batch that is not empty."""
        for prepared in self._source:
            self._pending.append(prepared)
            if prepared.labels:
                columns = zip(*prepared.numbers, strict=True)
                return (prepared.encoded, *(list(column) for column in columns))
        raise StopIteration

    def _read_ahead(self, micro_batches: list[MicroBatch]) -> Iterator[_Prepared]:
        """Yield prepared micro-batches in order, while threads read the next ones."""
        waiting = iter(micro_batches)
        running: deque[Future[_Prepared]] = deque()
        for micro_batch in itertools.islice(waiting, _READ_AHEAD):
            running.append(self._readers.submit(self._prepare, micro_batch))
        while running:
            prepared = running.popleft().result()
            for micro_batch in itertools.islice(waiting, 1):
                running.append(self._readers.submit(self._prepare, micro_batch))
            yield prepared

    def _prepare(self, micro_batch: MicroBatch) -> _Prepared:
        """Read the files of one micro-batch and draw their boxes."""
        if not hasattr(self._local, "samples"):
            # Each thread has its own open files: another thread might close a shared one.
            self._local.samples = copy.copy(self._samples)
        prepared = _Prepared(micro_batch.epoch)
        read = functools.partial(self._read, micro_batch.epoch)
        generator = torch.Generator()
        seeds = sample_seeds(self._seed, micro_batch.epoch, micro_batch.indices, micro_batch.copies)
        for index, seed in zip(micro_batch.indices.tolist(), seeds.tolist(), strict=True):
            sample, problems = read_by_policy(
                read, index, len(self._samples), self._on_bad_image, self._max_bad_images
            )
            prepared.problems += problems
            if sample is None:
                continue
            actual, encoded, label, (height, width) = sample
            prepared.indices.append(actual)
            prepared.encoded.append(np.frombuffer(encoded, dtype=np.uint8))
            prepared.labels.append(label)
            prepared.numbers.append(
                self._geometry.numbers(height, width, generator.manual_seed(seed))
            )
        return prepared

    def _read(self, epoch: int, index: int) -> tuple[int, bytes, int, tuple[int, int]]:
        """Return (index, image file, label, (height, width)).

        An image that DALI might read differently from our decoder, or not at all, becomes a file
        of plain pixels.
        """
        samples: EncodedSamples = self._local.samples
        encoded, label = samples.encoded(index)
        try:
            size = None if (epoch, index) in self._decoded_here else jpeg_size(encoded)
            if size is None:
                pixels = decode(encoded)
                encoded, size = _netpbm(pixels), pixels.shape[:2]
            return index, encoded, label, size
        except DataError as error:
            raise DataError(f"{samples.path(index)} {error}") from error

    def _unreadable(self) -> Iterator[tuple[int, int]]:
        """Yield (epoch, index) of the images among DALI's that it cannot decode one by one."""
        pipeline, single = None, deque[tuple[list[Any], ...]]()
        for prepared in self._pending:
            for index, *inputs in zip(
                prepared.indices,
                prepared.encoded,
                *zip(*prepared.numbers, strict=True),
                strict=True,
            ):
                if pipeline is None:
                    pipeline = build_pipeline(
                        self._geometry,
                        1,
                        self._threads,
                        self._device,
                        lambda: single.popleft(),
                        exec_async=False,
                        exec_pipelined=False,
                    )
                single.append(tuple([each] for each in inputs))
                try:
                    pipeline.run()
                except RuntimeError:
                    yield prepared.epoch, index
                    pipeline = None


def _netpbm(pixels: Pixels) -> bytes:
    """Return an image file that holds the pixels unchanged (PPM)."""
    height, width, _ = pixels.shape
    return b"P6 %d %d 255\n" % (width, height) + pixels.tobytes()


class DaliTrainLoader(_DaliLoader):
    """This rank's part of the training samples. The contract is in `data`.

    `geometry_in` returns the geometry of an epoch, which may differ in size. `repeats` is the number
    of augmented copies of each sample in its step.
    """

    def __init__(
        self,
        samples: EncodedSamples,
        geometry_in: Callable[[int], Geometry],
        share: Share,
        repeats: int,
        block: Blocks = 1,
        **options: Any,
    ) -> None:
        self._sampler = TrainSampler(len(samples), share, block, repeats)
        self._geometry_in = geometry_in
        super().__init__(samples, geometry_in(0), share.batch_size, share.seed, **options)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of `epoch` from optimizer step `first_step` on."""
        self._sampler.epoch, self._sampler.first_step = epoch, first_step
        geometry = self._geometry_in(epoch)
        if geometry.size != self._geometry.size:
            self._geometry, self._pipeline = geometry, None  # DALI's graph has one size
        yield from self._batches(self._sampler)

    def batches_from(self, step: int) -> Iterator[Batch]:
        """Yield micro-batches from global optimizer step `step` on, without end."""
        return epochs_from(self.epoch, self._sampler.order.steps, step)


class DaliValLoader(_DaliLoader):
    """This rank's share of the validation images, in order; it can be iterated repeatedly."""

    def __init__(
        self, samples: EncodedSamples, geometry: Geometry, share: Share, **options: Any
    ) -> None:
        self._sampler = ValSampler(len(samples), share)
        super().__init__(samples, geometry, share.val_batch_size, seed=0, **options)

    def __iter__(self) -> Iterator[Batch]:
        """Yield (images, labels)."""
        yield from self._batches(self._sampler)
