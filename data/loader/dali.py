"""Micro-batches decoded and resized by DALI, on the GPU where there is one.

DALI gets from us which images to decode and where to cut them: the order of the samples, their
boxes and flips are those of `data.loading`, drawn by the same code from the same seeds. So the
shuffle is perfect (DALI's own TFRecord reader shuffles within a buffer only), the last step is
short on every rank alike, every validation image comes once, and the state of the data at any step
of a run is (epoch, step), with any number of ranks. What differs are the pixels of DALI's decoder
and filter. Images that it might read otherwise than we do, or not at all, come to it decoded.

Run with DALI 2.0.0 and 2.4.0. The device is the process's current GPU if it has initialised CUDA.
"""

from __future__ import annotations

import copy
import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia import dali
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Generator

from data import Batch, DataError
from data.loading import BadImages, MicroBatch, TrainSampler, ValSampler, by_policy
from data.prefetch import batch_device, one_ahead
from data.sampler import Order, sample_seeds
from data.transforms import Pixels, TrainTransform, ValTransform, decode, jpeg_size

# DALI makes what is in these at run time.
fn: Any = dali.fn
types: Any = dali.types
backend: Any = dali.backend

# As torchvision: a rotation noted in EXIF is not applied. Decoders before DALI 2.2 never apply it
# and know no such argument.
_UPRIGHT: dict[str, Any] = (
    {"adjust_orientation": False}
    if backend.GetSchema("decoders__Image").HasArgument("adjust_orientation")
    else {}
)

# Micro-batches read ahead of the one that DALI takes next.
_READ_AHEAD = 4

Numbers = tuple[Any, ...]  # NumPy arrays of int32 or float32


class EncodedSamples(Protocol):
    """Encoded images by number: a tree, or records."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def encoded(self, index: int) -> tuple[bytes, int]:
        """Return the image file's bytes and the label."""
        ...

    def path(self, index: int) -> str:
        """Return the sample's name for error messages."""
        ...


class Geometry(Protocol):
    """Where images are cut and how they are resized: the numbers of each, and DALI's part."""

    size: int

    def numbers(self, height: int, width: int, generator: Generator) -> Numbers:
        """Return what DALI has to know of one image."""
        ...

    def graph(self, encoded: Any, device: str, *numbers: Any) -> Any:
        """Build DALI's operators from encoded images to uint8 (size, size, 3)."""
        ...


class TrainGeometry:
    """A random box, resized to a square, perhaps mirrored; only the box is decoded."""

    def __init__(self, transform: TrainTransform, antialias: bool) -> None:
        self.size = transform.size
        self._transform = transform
        self._antialias = antialias

    def numbers(self, height: int, width: int, generator: Generator) -> Numbers:
        """Return (top, left), (height, width) and whether to mirror."""
        box = self._transform.box(height, width, generator)
        return (
            np.array(box[:2], np.int32),
            np.array(box[2:], np.int32),
            np.array(self._transform.mirrored(generator), np.int32),
        )

    def graph(self, encoded: Any, device: str, *numbers: Any) -> Any:
        """Decode the box, resize it, mirror it."""
        start, extent, mirrored = numbers
        images = fn.decoders.image_slice(
            encoded,
            start,
            extent,
            axes=[0, 1],
            device=device,
            output_type=types.RGB,
            **_UPRIGHT,
        )
        images = fn.resize(images, size=[self.size, self.size], antialias=self._antialias)
        return fn.flip(images, horizontal=mirrored)


class ValGeometry:
    """The shorter side resized, then the central square."""

    def __init__(self, transform: ValTransform, antialias: bool) -> None:
        self.size = transform.size
        self._transform = transform
        self._antialias = antialias

    def numbers(self, height: int, width: int, generator: Generator) -> Numbers:
        """Return the (height, width) to resize to, and (top, left) of the square."""
        new_height, new_width, top, left = self._transform.place(height, width)
        return np.array([new_height, new_width], np.float32), np.array([top, left], np.int32)

    def graph(self, encoded: Any, device: str, *numbers: Any) -> Any:
        """Decode, resize, cut."""
        extent, start = numbers
        images = fn.decoders.image(encoded, device=device, output_type=types.RGB, **_UPRIGHT)
        images = fn.resize(images, size=extent, antialias=self._antialias)
        return fn.slice(images, start, [self.size, self.size], axes=[0, 1])


@dataclass
class _Prepared:
    """One micro-batch as DALI takes it."""

    epoch: int
    indices: list[int]
    encoded: list[NDArray[np.uint8]]
    numbers: list[Numbers]
    labels: list[int]
    problems: list[str]


class _Stopped(Exception):
    """DALI stopped at images: {(epoch, index)}."""


class _Batches:
    """Micro-batches through one DALI pipeline, which lives as long as the loader."""

    def __init__(
        self,
        samples: EncodedSamples,
        geometry: Geometry,
        batch_size: int,
        threads: int,
        seed: int,
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
        # (epoch, index) of images at which DALI stopped. Of each epoch, because it depends on the
        # box whether it does, and what comes out must not depend on what went before.
        self._ours: set[tuple[int, int]] = set()
        self._local = threading.local()
        self._readers = ThreadPoolExecutor(self._threads)
        self._device = batch_device()
        self._pipeline: Pipeline | None = None
        self._source: Iterator[_Prepared] = iter(())
        self._pending: deque[_Prepared] = deque()

    @property
    def bad_images(self) -> list[str]:
        """One message for each image that could not be read so far."""
        return self._bad.messages

    def close(self) -> None:
        """Give back DALI's memory and threads."""
        self._pipeline = None
        self._readers.shutdown()

    def batches(self, wanted: Iterable[MicroBatch]) -> Iterator[Batch]:
        """Yield the micro-batches `wanted`, empty ones too."""
        yield from one_ahead(self._passes(wanted), self._device)

    def _passes(self, wanted: Iterable[MicroBatch]) -> Iterator[Batch]:
        left = deque(wanted)
        while left:
            try:
                for batch in self._pass(list(left)):
                    left.popleft()
                    yield batch
                if left:
                    raise RuntimeError(f"DALI stopped {len(left)} micro-batches before the end")
            except _Stopped as found:
                # DALI cannot go on after an error; a new pipeline does, from the same micro-batch.
                self._ours |= found.args[0]

    def _pass(self, wanted: list[MicroBatch]) -> Iterator[Batch]:
        """Yield until the end, or until DALI stops at an image."""
        if self._pipeline is None:
            self._pipeline = self._build(self._batch_size, self._next)
        self._source = self._read_ahead(wanted)
        self._pending.clear()
        finished = False
        try:
            while True:
                try:
                    (images,) = self._pipeline.run()
                except StopIteration:
                    break
                except RuntimeError as error:
                    culprits = set(self._culprits()) - self._ours
                    if not culprits:
                        raise DataError(f"DALI stopped: {error}") from error
                    raise _Stopped(culprits) from error
                yield from self._empty_ones()
                yield self._batch(images, self._pending.popleft())
            yield from self._empty_ones()
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

    def _empty_ones(self) -> Iterator[Batch]:
        while self._pending and not self._pending[0].labels:
            yield self._batch(None, self._pending.popleft())

    def _build(
        self, batch_size: int, source: Callable[[], tuple[list[Any], ...]], **options: Any
    ) -> Pipeline:
        gpu = self._device.type == "cuda"
        device = self._device.index if gpu else None
        pipeline = Pipeline(batch_size, self._threads, device, **options)
        kinds = {np.dtype(np.int32): types.INT32, np.dtype(np.float32): types.FLOAT}
        example = self._geometry.numbers(64, 64, Generator())
        with pipeline:
            encoded, *numbers = fn.external_source(
                source=source,
                num_outputs=1 + len(example),
                dtype=[types.UINT8, *(kinds[each.dtype] for each in example)],
                ndim=[1, *(each.ndim for each in example)],
            )
            pipeline.set_outputs(self._geometry.graph(encoded, "mixed" if gpu else "cpu", *numbers))
        pipeline.build()
        return pipeline

    def _next(self) -> tuple[list[Any], ...]:
        """Return what DALI asks for: the next micro-batch that is not empty."""
        for prepared in self._source:
            self._pending.append(prepared)
            if prepared.labels:
                columns = zip(*prepared.numbers, strict=True)
                return (prepared.encoded, *(list(column) for column in columns))
        raise StopIteration

    def _read_ahead(self, wanted: list[MicroBatch]) -> Iterator[_Prepared]:
        """Yield prepared micro-batches in order, some being read by threads meanwhile."""
        left = iter(wanted)
        running: deque[Future[_Prepared]] = deque()
        for micro_batch in itertools.islice(left, _READ_AHEAD):
            running.append(self._readers.submit(self._prepare, micro_batch))
        while running:
            prepared = running.popleft().result()
            for micro_batch in itertools.islice(left, 1):
                running.append(self._readers.submit(self._prepare, micro_batch))
            yield prepared

    def _prepare(self, wanted: MicroBatch) -> _Prepared:
        """Read the files of one micro-batch and draw their boxes."""
        if not hasattr(self._local, "samples"):
            # With open files of its own: another thread might close a shared one.
            self._local.samples = copy.copy(self._samples)
        prepared = _Prepared(wanted.epoch, [], [], [], [], [])
        read = functools.partial(self._read, wanted.epoch)
        generator = Generator()
        seeds = sample_seeds(self._seed, wanted.epoch, wanted.indices)
        for index, seed in zip(wanted.indices.tolist(), seeds.tolist(), strict=True):
            found, problems = by_policy(
                read, index, len(self._samples), self._on_bad_image, self._max_bad_images
            )
            prepared.problems += problems
            if found is None:
                continue
            actual, encoded, label, (height, width) = found
            prepared.indices.append(actual)
            prepared.encoded.append(np.frombuffer(encoded, dtype=np.uint8))
            prepared.labels.append(label)
            prepared.numbers.append(
                self._geometry.numbers(height, width, generator.manual_seed(seed))
            )
        return prepared

    def _read(self, epoch: int, index: int) -> tuple[int, bytes, int, tuple[int, int]]:
        """Return (index, image file, label, (height, width)).

        What DALI could see differently than our decoder, or not at all, it gets as plain pixels.
        """
        samples: EncodedSamples = self._local.samples
        encoded, label = samples.encoded(index)
        try:
            size = None if (epoch, index) in self._ours else jpeg_size(encoded)
            if size is None:
                pixels = decode(encoded)
                encoded, size = _netpbm(pixels), pixels.shape[:2]
            return index, encoded, label, size
        except DataError as error:
            raise DataError(f"{samples.path(index)} {error}") from error

    def _culprits(self) -> Iterator[tuple[int, int]]:
        """Yield (epoch, index) of the images that DALI holds and cannot decode one by one."""
        pipeline, alone = None, deque[tuple[list[Any], ...]]()
        for prepared in self._pending:
            for index, *inputs in zip(
                prepared.indices,
                prepared.encoded,
                *zip(*prepared.numbers, strict=True),
                strict=True,
            ):
                if pipeline is None:
                    pipeline = self._build(
                        1, lambda: alone.popleft(), exec_async=False, exec_pipelined=False
                    )
                alone.append(tuple([each] for each in inputs))
                try:
                    pipeline.run()
                except RuntimeError:
                    yield prepared.epoch, index
                    pipeline = None


def _netpbm(pixels: Pixels) -> bytes:
    """Return an image file that holds the pixels as they are (PPM)."""
    height, width, _ = pixels.shape
    return b"P6 %d %d 255\n" % (width, height) + pixels.tobytes()


class DaliTrainLoader(_Batches):
    """This rank's part of every epoch. The contract is in `data`."""

    def __init__(
        self,
        samples: EncodedSamples,
        geometry: Geometry,
        order: Order,
        rank: int,
        size: int,
        **options: Any,
    ) -> None:
        self._sampler = TrainSampler(order, rank, size)
        super().__init__(samples, geometry, order.batch_size, seed=order.seed, **options)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of `epoch` from optimizer step `first_step` on."""
        self._sampler.epoch, self._sampler.first_step = epoch, first_step
        yield from self.batches(self._sampler)


class DaliValLoader(_Batches):
    """This rank's share of the validation images, in order; iterate it again and again."""

    def __init__(
        self,
        samples: EncodedSamples,
        geometry: Geometry,
        batch_size: int,
        rank: int,
        size: int,
        **options: Any,
    ) -> None:
        self._sampler = ValSampler(len(samples), batch_size, rank, size)
        super().__init__(samples, geometry, batch_size, seed=0, **options)

    def __iter__(self) -> Iterator[Batch]:
        """Yield (images, labels)."""
        yield from self.batches(self._sampler)
