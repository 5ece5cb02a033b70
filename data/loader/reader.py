"""From samples to micro-batches, in a worker process or in the trainer's.

A worker process imports this module: torch, numpy and the decoder, nothing heavier.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Generator, Tensor
from torch.utils.data import get_worker_info

from data import Batch, DataError
from data.loader.bad_images import read_by_policy
from data.loader.order import sample_seeds
from data.loader.sampler import MicroBatch
from data.pixels.boxes import Pixels, crop, full_image
from data.pixels.transforms import ByEpoch, Transform, in_epoch
from data.samples import Samples


class Reader:
    """Reads entire micro-batches: the data set that torch's DataLoader sees.

    Attributes:
        samples: Source of the images.
        transform: Transform of each image.
        seed: Seed of the run; a sample's augmentation is seeded by (seed, epoch, index, copy).
        on_bad_image: ``error``: raise. ``skip``: the micro-batch gets smaller. ``replace``: the
            next sample that can be read takes the bad one's place, so micro-batches stay full.
        max_bad_images: Number of bad images on this rank after which the run stops.
    """

    def __init__(
        self,
        samples: Samples,
        transform: Transform | ByEpoch,
        seed: int = 0,
        on_bad_image: str = "error",
        max_bad_images: int = 0,
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed
        self.on_bad_image = on_bad_image
        self.max_bad_images = max_bad_images

    def __getitems__(self, micro_batch: MicroBatch) -> tuple[Batch, list[str]] | DataError:
        """Return a batch and the messages about its bad images, or the error for the trainer."""
        try:
            return self.read(micro_batch)
        except DataError as error:
            return error

    def read(self, micro_batch: MicroBatch) -> tuple[Batch, list[str]]:
        """Return one micro-batch, and the messages about images that could not be read."""
        indices = micro_batch.indices
        transform = in_epoch(self.transform, micro_batch.epoch)
        images = _empty_images(len(indices), transform.shape)
        labels = torch.empty(len(indices), dtype=torch.int64)
        generator = Generator()
        seeds = sample_seeds(self.seed, micro_batch.epoch, indices, micro_batch.copies)
        count, bad = 0, []
        for index, seed in zip(indices.tolist(), seeds.tolist(), strict=True):
            sample, problems = read_by_policy(
                functools.partial(self._read_one, transform, micro_batch.epoch, generator, seed),
                index,
                len(self.samples),
                self.on_bad_image,
                self.max_bad_images,
            )
            bad += problems
            if sample is None:
                continue
            pixels, labels[count] = sample
            images[count].copy_(transform(pixels, generator))
            count += 1
        return (images[:count], labels[:count]), bad

    def _read_one(
        self, transform: Transform, epoch: int, generator: Generator, seed: int, index: int
    ) -> tuple[Pixels, int]:
        generator.manual_seed(seed)  # each time: a replacement draws what the bad image would have
        crop_fn = functools.partial(transform.box, generator=generator)
        if epoch > 0 and self.on_bad_image == "error":
            return self.samples.read(index, crop_fn)
        # Decoding only a box can miss damage elsewhere in the file. The first epoch decodes every
        # image in full, so that a bad one ends the job before days of training. Where bad images
        # are left out or replaced, every epoch must find the same ones.
        pixels, label = self.samples.read(index, full_image)
        return crop(pixels, crop_fn(*pixels.shape[:2])), label


def _empty_images(count: int, shape: tuple[int, ...]) -> Tensor:
    """Allocate memory for `count` images in channels-last layout.

    In a worker the memory is shared with the trainer from the start, so that sending the batch
    copies nothing; torch's own collation does the same.
    """
    numel = count * math.prod(shape)
    if get_worker_info() is None:
        flat = torch.empty(numel, dtype=torch.uint8)
    else:
        flat = torch.tensor((), dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(numel))
    channels, height, width = shape[-3:]
    channels_last = flat.view(count, *shape[:-3], height, width, channels)
    return channels_last.movedim(-1, -3)
