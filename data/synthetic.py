"""Seeded noise.

A source without files, for speed runs and tests. Importing it loads neither torch nor NumPy.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data import DataError, TrainLoader, ValLoader

if TYPE_CHECKING:
    from data.loading import Reader
    from data.transforms import Pixels


@dataclass(frozen=True)
class Synthetic:
    """Images of noise with labels index % classes. The contract is in `data`.

    Image i is the same in every epoch and differs from all others. Its mean grey level grows with
    its class, so that a network can learn it.
    """

    image_size: int = field(default=224, metadata={"help": "side of the square images, in pixels"})
    num_classes: int = field(default=1000, metadata={"help": "number of classes"})
    train_size: int = field(default=1_281_167, metadata={"help": "number of training images"})
    val_size: int = field(default=50_000, metadata={"help": "number of validation images"})

    mean = (127.5, 127.5, 127.5)
    std = (64.0, 64.0, 64.0)

    def check(self) -> None:
        """Raise DataError for sizes that cannot be had."""
        for name in ("image_size", "num_classes", "train_size", "val_size"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise DataError(f"{flag} {getattr(self, name)} must be 1 at least")

    def start_workers(self) -> None:
        """Start the process that loader processes are forked from."""
        from data.workers import start_forkserver

        start_forkserver()

    def train_loader(
        self,
        *,
        batch_size: int,
        effective_batch_size: int,
        drop_last: bool,
        rank: int,
        size: int,
        seed: int,
        workers: int,
    ) -> TrainLoader:
        """Make the training loader of one rank."""
        from data import loading
        from data.sampler import Order

        order = Order(self.train_size, batch_size, effective_batch_size, drop_last, seed)
        return loading.TrainLoader(self._reader(self.train_size, 0), order, rank, size, workers)

    def val_loader(self, *, batch_size: int, rank: int, size: int, workers: int) -> ValLoader:
        """Make the validation loader of one rank."""
        from data import loading

        reader = self._reader(self.val_size, self.train_size)
        return loading.ValLoader(reader, batch_size, rank, size, workers)

    def _reader(self, samples: int, first: int) -> Reader:
        from data.loading import Reader
        from data.transforms import ValTransform

        noise = _Noise(samples, first, self.num_classes, self.image_size)
        return Reader(noise, ValTransform(self.image_size, self.image_size))


@dataclass(frozen=True)
class _Noise:
    """Numbers `first` .. `first + samples` of the noise."""

    samples: int
    first: int
    classes: int
    side: int

    def __len__(self) -> int:
        return self.samples

    def read(self, index: int) -> tuple[Pixels, int]:
        """Return an image and its label: a window of one block of noise, brighter by its class."""
        import numpy as np

        numel = 3 * self.side * self.side
        start = (self.first + index) * 7919 % _BLOCK
        label = index % self.classes
        window = _block(numel)[start : start + numel] + np.uint8(label * 127 // self.classes)
        return window.reshape(self.side, self.side, 3), label


_BLOCK = 1_000_003  # prime: 7919 steps through all of it before an image comes back


@functools.cache
def _block(numel: int) -> Pixels:
    import numpy as np

    words = np.random.Philox(key=0).random_raw((_BLOCK + numel) // 8 + 1)
    return words.view(np.uint8)[: _BLOCK + numel] >> np.uint8(1)
