"""DALI's operators: decode, crop and resize images at boxes that we draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from nvidia import dali
from nvidia.dali.pipeline import Pipeline
from torch import Generator

from data.pixels.transforms import TrainTransform, ValTransform

# DALI creates the contents of these at run time.
fn: Any = dali.fn
types: Any = dali.types
backend: Any = dali.backend

# torchvision ignores the rotation that EXIF asks for, so DALI must too. Decoders before DALI 2.2
# never apply it and do not know this argument.
_UPRIGHT: dict[str, Any] = (
    {"adjust_orientation": False}
    if backend.GetSchema("decoders__Image").HasArgument("adjust_orientation")
    else {}
)

Numbers = tuple[Any, ...]  # NumPy arrays of int32 or float32


class Geometry(Protocol):
    """Where to crop images and how to resize them: the numbers of each image, and DALI's graph."""

    size: int

    def numbers(self, height: int, width: int, generator: Generator) -> Numbers:
        """Return the numbers that DALI needs for one image."""
        ...

    def graph(self, encoded: Any, device: str, *numbers: Any) -> Any:
        """Build DALI's operators from encoded images to uint8 (size, size, 3)."""
        ...


class TrainGeometry:
    """A random box, resized to a square and perhaps mirrored. Only the box is decoded."""

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
        """Decode, resize, crop."""
        extent, start = numbers
        images = fn.decoders.image(encoded, device=device, output_type=types.RGB, **_UPRIGHT)
        images = fn.resize(images, size=extent, antialias=self._antialias)
        return fn.slice(images, start, [self.size, self.size], axes=[0, 1])


def build_pipeline(
    geometry: Geometry,
    batch_size: int,
    threads: int,
    device: torch.device,
    source: Callable[[], tuple[list[Any], ...]],
    **options: Any,
) -> Pipeline:
    """Build a pipeline that asks `source` for encoded images and their numbers.

    Args:
        geometry: The numbers and the operators.
        batch_size: Largest number of images of a batch.
        threads: DALI's decoding threads.
        device: Where the images go.
        source: Returns the lists of one batch, or raises StopIteration.
        options: Further options of DALI's pipeline.
    """
    gpu = device.type == "cuda"
    pipeline = Pipeline(batch_size, threads, device.index if gpu else None, **options)
    kinds = {np.dtype(np.int32): types.INT32, np.dtype(np.float32): types.FLOAT}
    example = geometry.numbers(64, 64, Generator())
    with pipeline:
        encoded, *numbers = fn.external_source(
            source=source,
            num_outputs=1 + len(example),
            dtype=[types.UINT8, *(kinds[each.dtype] for each in example)],
            ndim=[1, *(each.ndim for each in example)],
        )
        pipeline.set_outputs(geometry.graph(encoded, "mixed" if gpu else "cpu", *numbers))
    pipeline.build()
    return pipeline
