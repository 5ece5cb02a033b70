"""Images by number: folders, records and arrays, and which of them to exclude."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from data.pixels.boxes import CropFn, Pixels


class Samples(Protocol):
    """Images by number. One copy is sent to each worker process."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def read(self, index: int, crop_fn: CropFn) -> tuple[Pixels, int]:
        """Return one box of an image, uint8 (height, width, 3), and the image's label.

        Raises:
            DataError: The image cannot be read; the message names it.
        """
        ...


class LabelledSamples(Samples, Protocol):
    """Samples that know their number of classes and their identity."""

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are 0 .. num_classes - 1."""
        ...

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes in the order of the labels; empty if they are unknown."""
        ...

    @property
    def fingerprint(self) -> str:
        """Return a short hash of the samples' names and labels in order."""
        ...


class ExcludableSamples(LabelledSamples, Protocol):
    """Samples from which a list of the user's excludes some."""

    @property
    def unmatched(self) -> Sequence[str]:
        """Return the lines of the list that name no sample."""
        ...


class EncodedSamples(ExcludableSamples, Protocol):
    """Samples that also give the encoded image file, for another decoder."""

    def encoded(self, index: int) -> tuple[bytes, int]:
        """Return the image file's bytes and the label."""
        ...

    def path(self, index: int) -> str:
        """Return the sample's name for error messages."""
        ...


class NumberedSamples(EncodedSamples, Protocol):
    """Samples whose names and labels are known without reading an image."""

    def name(self, index: int) -> str:
        """Return the sample's name as a line of ``--exclude`` has it, without the split."""
        ...
