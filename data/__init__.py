"""Image data: where samples come from, their order, and what happens to their pixels.

The folders: `data.sources` (what a training script names), `data.samples` (images by number),
`data.loader` (order and batches), `data.pixels` (decoding and transforms), `data.tooling` (what the
command-line tools share). The tools run as ``python -m data.<tool>``.

The contract between a source and the trainer
---------------------------------------------
A *source* is a frozen dataclass whose fields are the data flags of one training script. It never
imports the trainer and never asks for its rank: a `Share` tells it which samples this rank takes.

* ``check()`` raises a ``DataError`` for everything that can be seen to be wrong before training. An
  error that only shows when a file is read is a ``DataError`` from the loader, which names the file.
* ``start_workers(n)`` comes before MPI is initialised. ``train_loader(share, n)`` and
  ``val_loader(share, n)`` make one loader each for the whole run.
* ``train_loader.batches_from(step)`` yields this rank's micro-batches from global optimizer step
  ``step`` on, epoch after epoch, without end. Nothing of the next epoch is read before its first
  micro-batch is asked for.
* The order of samples belongs to the job, not to the cluster: there is one permutation per (seed,
  epoch). Step ``k`` takes samples ``k*B .. (k+1)*B`` of it (``B`` = effective batch size), divided
  into micro-batches of ``batch_size``; micro-batch ``i`` of the step goes to rank ``i % size``. A
  sample's augmentation is seeded by (seed, epoch, index). So every combination of ranks and
  accumulation sees the same micro-batches with the same pixels.
* With repeated augmentation (``repeated_aug`` = N > 1) an epoch has as many places, but they go to
  the first ceil(samples / N) samples of the permutation. Place ``p`` is copy ``p % N`` of sample
  ``p // N``. Within a step the places are rearranged so that copies of a sample fall into different
  micro-batches if there are N of them. The seed of a copy also contains its number.
* The last step of an epoch may be short. Its ``R`` samples are divided evenly into ``n = ceil(R /
  batch_size)`` micro-batches, and every rank yields ``ceil(n / size)`` of them. A rank for which
  none is left yields an empty one (0 images), because ranks with unequal numbers of batches would
  wait for each other forever. With ``drop_last`` the short step is left out.
* The validation loader yields every validation image exactly once over all ranks: rank ``r`` takes
  images ``r, r + size, r + 2*size, ...`` in order. Ranks may differ in their number of batches, and
  a rank may have none.
* ``class_names`` and ``warnings`` are lists of texts. The trainer stores the first with the weights
  and prints the second once, before training. It also prints ``description``, one line.
* An image that cannot be read stops the run. If the user asks for it, the image is left out instead
  (its micro-batch gets smaller, perhaps empty) or replaced by another image. ``loader.bad_images``
  lists such images. A fault of the whole set (a ``SetError``, such as labels that count from 0)
  always stops the run.
* ``close()`` stops worker processes and DALI at any point of an epoch.
* ``fingerprint`` tells whether two ranks, or a run and the one it resumes, see the same samples.
  Paths say nothing about that, so they do not count when a run is resumed (metadata ``same_run``).
* A batch is ``(images, labels)``. Images are uint8 pixels of shape (n, 3, height, width), which the
  trainer normalises on its device with the source's ``mean`` and ``std`` (in units of 0..255), or
  floats that are already normalised. Labels are int64 of shape (n,), checked against
  ``num_classes``. uint8 images lie in channels-last memory: decoders produce that layout, and
  convolutions are fastest with it. If the process has initialised CUDA before it makes the loader,
  both tensors lie on its current GPU, and the next batch is on its way (see
  `data.loader.prefetch`).
* ``image_size`` is the side of the validation images. ``train_sizes`` is the side of the training
  images as pairs of (first epoch from 1, side); it is constant within an epoch.
* A source with a field ``views`` that is 2 delivers two distorted views of each image, in one
  tensor of shape (n, 2, 3, height, width). Those of the validation never change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Batch: TypeAlias = "tuple[Tensor, Tensor]"

# Mean and standard deviation of ImageNet's channels (torchvision's values), in units of 0..255.
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


class DataError(Exception):
    """The data cannot be used as they are; the message says what to do."""

    exit_code = 3


class SetError(DataError):
    """A fault of the data set or of the machine, not of one image.

    It always stops the run: leaving images out (``--on-bad-image``, ``--exclude``) would hide it.
    """


class FlagError(DataError):
    """The value of a data flag is impossible, whatever the data are."""

    exit_code = 2


class Share(Protocol):
    """Which samples one rank takes, and in what batches."""

    @property
    def rank(self) -> int:
        """Number of this rank, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    @property
    def batch_size(self) -> int:
        """Samples of a full micro-batch."""
        ...

    @property
    def effective_batch_size(self) -> int:
        """Samples of a full optimizer step, over all ranks and accumulated micro-batches."""
        ...

    @property
    def val_batch_size(self) -> int:
        """Samples of a full validation batch."""
        ...

    @property
    def drop_last(self) -> bool:
        """Whether to leave out the short last step of an epoch."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the run."""
        ...


class TrainLoader(Protocol):
    """This rank's part of the training samples."""

    def batches_from(self, step: int) -> Iterator[Batch]:
        """Yield micro-batches from global optimizer step `step` (from 0) on, without end."""
        ...

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of `epoch` (from 0), from its optimizer step `first_step` on."""
        ...

    def close(self) -> None:
        """Stop worker processes, if there are any."""
        ...

    @property
    def bad_images(self) -> Sequence[str]:
        """One message for each image that this rank could not read so far and went on without."""
        ...


class ValLoader(Protocol):
    """This rank's share of the validation images; it can be iterated repeatedly."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches."""
        ...

    def close(self) -> None:
        """Stop worker processes, if there are any."""
        ...

    @property
    def bad_images(self) -> Sequence[str]:
        """The same as for TrainLoader."""
        ...


class Source(Protocol):
    """What a training script hands to the trainer."""

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are 0 .. num_classes - 1."""
        ...

    @property
    def class_names(self) -> Sequence[str]:
        """Name of each class in the order of the labels; empty if the names are unknown."""
        ...

    @property
    def warnings(self) -> Sequence[str]:
        """What looks wrong about the data but does not forbid training, and what was left out."""
        ...

    @property
    def description(self) -> str:
        """One line about where the images are and what their labels mean; may be empty."""
        ...

    @property
    def image_size(self) -> int:
        """Side of the square validation images, in pixels; known without reading any file."""
        ...

    @property
    def train_sizes(self) -> Sequence[tuple[int, int]]:
        """Pairs of (first epoch from 1, side of the square training images in pixels).

        The trainer takes a source without this property as one of a single size.
        """
        ...

    @property
    def augmentation(self) -> str:
        """The augmentation of the training images in words; empty if there is none.

        The trainer takes a source without this property as one without augmentation.
        """
        ...

    @property
    def repeated_aug(self) -> int:
        """Copies of each training image in a step. The trainer takes 1 if there is no such value."""
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
        """Identity of the samples, their order and their labels: two hashes, training-validation.

        It does not depend on where the files are. For folders it is computed from the names alone,
        for records from names, sizes and the manifest's hashes, so it is fast once the files are
        listed.
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
        """Raise DataError, naming the flag and the fix, for anything wrong before training."""
        ...

    def for_validation(self) -> Source:
        """Return the same source for validation alone. Its training samples need not exist."""
        ...

    def start_workers(self, workers: int) -> None:
        """Start the process that loader workers are forked from; do nothing for 0 workers.

        Call it before MPI is initialised, because MPI does not survive a fork.
        """
        ...

    def train_loader(self, share: Share, workers: int) -> TrainLoader:
        """Make the training loader of one rank, with `workers` decoding processes."""
        ...

    def val_loader(self, share: Share, workers: int) -> ValLoader:
        """Make the validation loader of one rank."""
        ...
