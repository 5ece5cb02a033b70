"""Image data: where samples come from, in which order, and what is done to their pixels.

The contract between a source and the trainer
---------------------------------------------
A *source* is a frozen dataclass whose fields are the data flags of one training script. It is told
rank and size, it never asks for them, and it never imports the trainer.

* ``train_loader(...)`` makes one loader for the whole run; ``loader.epoch(e, first_step=k)`` then
  yields this rank's micro-batches of epoch ``e`` from optimizer step ``k`` of that epoch on.
* The order of samples belongs to the job, not to the cluster: one permutation per (seed, epoch).
  Step ``k`` takes samples ``k*B .. (k+1)*B`` of it (``B`` = effective batch size), cut into
  micro-batches of ``batch_size``; micro-batch ``i`` of the step goes to rank ``i % size``. A
  sample's augmentation is seeded by (seed, epoch, index). So every factorisation of ranks times
  accumulation sees the same micro-batches with the same pixels.
* The last step of an epoch may be short: its ``R`` samples are cut evenly into ``n = ceil(R /
  batch_size)`` micro-batches, and every rank yields ``ceil(n / size)`` of them, an empty one (0
  images) where none is left, because ranks with unequal numbers of batches wait for each other for
  ever. With ``drop_last`` that step is left out.
* ``val_loader(...)`` gives every validation image exactly once over all ranks: rank ``r`` takes
  images ``r, r + size, r + 2*size, ...`` in order. Ranks may differ in the number of batches; a
  rank may have none.
* ``fingerprint`` tells whether two ranks, or a run and the one it resumes, see the same samples; the
  paths, which say nothing about that, are not part of what a run is (``same_run``).
* What can be seen to be wrong is a ``DataError`` from ``check()``, before training; what only shows
  when a file is read is a ``DataError`` from the loader, and names the file.
* An image that cannot be read stops the run, or (if the user said so) is left out, so that its
  micro-batch is smaller, perhaps empty, or is replaced by another; ``loader.bad_images`` tells.
* A batch is ``(images, labels)``: uint8 pixels of shape (n, 3, height, width) (the trainer
  normalises them on its device with the source's ``mean`` and ``std``, in units of 0..255) or
  floats that are already normalised; int64 labels of shape (n,), checked against ``num_classes``.
  The uint8 images lie in channels-last memory, which is both how decoders give them and what
  convolutions like best. If the process had initialised CUDA when it made the loader, that is,
  where the trainer chose a GPU before, both lie on its current GPU, one batch ahead of the one
  being used (see `data.prefetch`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Batch: TypeAlias = "tuple[Tensor, Tensor]"

# Mean and standard deviation of ImageNet's channels (torchvision's figures), in units of 0..255.
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


class DataError(Exception):
    """The data are not usable as they are; the message says what to do."""

    exit_code = 3


class TrainLoader(Protocol):
    """This rank's part of every epoch."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of `epoch` (from 0), from its optimizer step `first_step` on."""
        ...

    def close(self) -> None:
        """Stop worker processes, if there are any."""
        ...

    @property
    def bad_images(self) -> Sequence[str]:
        """One message for each image that this rank could not read so far, and went on without."""
        ...


class ValLoader(Protocol):
    """This rank's share of the validation images; it can be iterated again and again."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches."""
        ...

    @property
    def bad_images(self) -> Sequence[str]:
        """As of TrainLoader."""
        ...


class Source(Protocol):
    """What a training script hands to the trainer."""

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are 0 .. num_classes - 1."""
        ...

    @property
    def image_size(self) -> int:
        """Side of the square images in a batch, in pixels; known without reading anything."""
        ...

    @property
    def train_size(self) -> int:
        """Number of training samples."""
        ...

    @property
    def val_size(self) -> int:
        """Number of validation samples."""
        ...

    @property
    def fingerprint(self) -> str:
        """Which samples these are, in which order, with which labels: two hashes, training-validation.

        The same wherever the files lie. Of folders it is made from the names alone, of records from
        names, sizes and the manifest's hashes, so that it takes no time once they are listed.
        """
        ...

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of each channel in units of 0..255, for uint8 batches."""
        ...

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of each channel in units of 0..255, for uint8 batches."""
        ...

    def check(self) -> None:
        """Raise DataError, naming the flag and the fix, for what is wrong before training."""
        ...

    def start_workers(self) -> None:
        """Start what decoding processes are forked from; called before MPI is, which does not survive a fork."""
        ...

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
        """Make the training loader of one rank.

        `batch_size` is the micro-batch, `workers` the decoding processes.
        """
        ...

    def val_loader(self, *, batch_size: int, rank: int, size: int, workers: int) -> ValLoader:
        """Make the validation loader of one rank."""
        ...
