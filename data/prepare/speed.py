"""How fast one process reads and decodes images, in the order and with the crops of training."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from data import DataError
from data.loader.order import Indices, permutation
from data.loader.reader import Reader
from data.loader.sampler import MicroBatch
from data.make_tfrecords import manifest
from data.make_tfrecords.shards import Shard, write_images
from data.pixels.transforms import TrainTransform
from data.samples import NumberedSamples
from data.samples.records import RecordSet

# Images and seconds of one measurement.
_IMAGES = 256
_SECONDS = 2.0

# Repetitions of the measurements that are compared; the fastest one counts.
_ROUNDS = 2

_BATCH = 16
_SIZE = 224  # side of the network's images, in pixels


@dataclass(frozen=True)
class Speed:
    """Images per second of one process.

    Attributes:
        first: When the images are read for the first time, from the disk or a file server.
        again: When they are read again, from the machine's memory; per second of CPU time.
        as_records: The same images again, from TFRecords; per second of CPU time.
        convert: Images per second that are read and written, without decoding.
        image_bytes: Mean size of an image file in bytes.
        images: Number of images that were measured.
    """

    first: float
    again: float
    as_records: float
    convert: float
    image_bytes: float
    images: int


def measure(samples: NumberedSamples, folder: str | None = None) -> Speed:
    """Measure some images as they are, and as TFRecords in a temporary folder.

    Args:
        samples: Training images.
        folder: Folder for the temporary records, removed at the end; None: the system's.

    Raises:
        DataError: No image can be read.
    """
    torch.set_num_threads(1)  # as in a worker process
    order = permutation(len(samples), 0, 0, getattr(samples, "block", 1))[:_IMAGES]
    with contextlib.suppress(DataError):
        samples.encoded(int(order[-1]))  # loads the libraries that this needs
    first, count = _images_per_second(samples, order, time.perf_counter)
    order = order[:count]
    with tempfile.TemporaryDirectory(dir=folder) as root:
        manifest.start(root, {})  # makes the folders
        began = time.perf_counter()
        records, size = _write(samples, order, root)
        convert = len(records) / (time.perf_counter() - began)
        pairs = [(samples, order), (records, permutation(len(records), 0, 0))]
        # Both take turns, so that other load on the machine slows both alike.
        rounds = [
            [_images_per_second(*each, time.process_time)[0] for each in pairs]
            for _ in range(_ROUNDS)
        ]
    again, as_records = map(max, zip(*rounds, strict=True))
    return Speed(first, again, as_records, convert, size / len(records), count)


def _images_per_second(
    samples: NumberedSamples, order: Indices, clock: Callable[[], float]
) -> tuple[float, int]:
    """Read images until the time is up; return images per second of `clock`, and their number."""
    transform = TrainTransform(_SIZE, (0.08, 1.0), (3 / 4, 4 / 3), True)
    reader = Reader(samples, transform, on_bad_image="skip", max_bad_images=len(order))
    began, count = clock(), 0
    for start in range(0, len(order), _BATCH):
        indices = order[start : start + _BATCH]
        reader.read(MicroBatch(1, indices, np.zeros_like(indices)))
        count += len(indices)
        if clock() - began > _SECONDS:
            break
    return count / (clock() - began), count


def _write(samples: NumberedSamples, order: Indices, folder: str) -> tuple[RecordSet, int]:
    """Write images as one record file; return its records and the bytes of the images."""
    images = []
    for index in order.tolist():
        try:
            encoded, label = samples.encoded(index)
        except DataError:
            continue
        images.append((encoded, label + 1, samples.name(index), None))
    if not images:
        raise DataError(f"none of {len(order)} images can be read; run python -m data.check")
    shard = Shard(folder, "train", "train-00000-of-00001")
    entry = write_images(shard, images)
    records = RecordSet([(shard.path, shard.index)], samples.num_classes)
    assert len(records) == entry["images"]
    return records, int(np.sum([len(encoded) for encoded, _, _, _ in images]))
