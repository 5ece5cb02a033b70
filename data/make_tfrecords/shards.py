"""The work of a converting process: write, or index, one record file."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data import DataError, SetError
from data.pixels.decode import decode_pil, dimensions, image_kind
from data.samples import tfrecord
from data.samples.record_files import INDEX_FOLDER
from data.samples.records import parse_example
from data.samples.tree import read_image
from data.tooling.atomic import replacing, write_json

# Folder of notes on finished shards, for a run that continues. It is removed once the manifest is
# written.
NOTES = "unfinished"


@dataclass(frozen=True)
class Conversion:
    """What happens to the images on their way into records.

    Attributes:
        reencode: Convert anything but RGB and grayscale JPEGs with intact EXIF into such a JPEG.
        short_side: Shrink images whose shorter side is longer than this, in pixels; 0: none.
        quality: Quality of the JPEGs that this writes.
    """

    reencode: bool
    short_side: int
    quality: int


@dataclass(frozen=True)
class Shard:
    """One file to write, or to index."""

    folder: str
    split: str
    name: str
    images: tuple[tuple[str, str, int], ...] = ()  # (path, name, label from 1)
    conversion: Conversion | None = None

    @property
    def path(self) -> str:
        """Path of the record file."""
        return os.path.join(self.folder, self.split, self.name)

    @property
    def index(self) -> str:
        """Path of the index file."""
        return os.path.join(self.folder, INDEX_FOLDER, self.split, self.name + ".idx")

    @property
    def note(self) -> str:
        """Path of the note which records that the shard is finished."""
        return os.path.join(self.folder, NOTES, f"{self.split}-{self.name}.json")

    @property
    def labels(self) -> Counter[int]:
        """Number of images of each label."""
        return Counter(label for _, _, label in self.images)


def write_shard(shard: Shard) -> dict[str, Any]:
    """Write one shard and its index file; return the shard's note."""
    return write_images(shard, _converted(shard))


def _converted(shard: Shard) -> Iterator[tuple[bytes, int, str, str | None]]:
    assert shard.conversion is not None
    for path, name, label in shard.images:
        encoded = read_image(path)
        try:
            encoded = convert(encoded, shard.conversion)
        except DataError as error:
            raise DataError(f"{path} {error}") from error
        yield encoded, label, name, name.split("/")[0]


def write_images(
    shard: Shard, images: Iterable[tuple[bytes, int, str, str | None]]
) -> dict[str, Any]:
    """Write one shard and its index file; return the shard's note.

    Args:
        shard: The shard.
        images: (image file, label from 1, its name, name of its class if that is known).
    """
    sha, index, offset = hashlib.sha256(), [], 0
    labels: Counter[int] = Counter()
    with replacing(shard.path) as file:
        for encoded, label, name, class_name in images:
            labels[label] += 1
            example: dict[str, tfrecord.Value] = {
                tfrecord.IMAGE: encoded,
                tfrecord.LABEL: label,
                "image/filename": os.fsencode(name),
            }
            if class_name is not None:
                example[tfrecord.CLASS_NAME] = os.fsencode(class_name)
            record = tfrecord.record(tfrecord.encode_example(example))
            sha.update(record)
            index.append((offset, len(record)))
            offset += len(record)
            file.write(record)
    return _finish(shard, index, sha.hexdigest(), labels, {}, {})


def index_shard(shard: Shard) -> dict[str, Any]:
    """Read one shard, verify it and write its index file; return the shard's note."""
    sha, index = hashlib.sha256(), []
    labels: Counter[int] = Counter()
    names: dict[int, str] = {}
    about = {"modified": os.stat(shard.path).st_mtime_ns}
    for offset, payload in tfrecord.read_records(shard.path):
        try:
            example = parse_example(payload)
            if example.label < 0:
                raise SetError(f"label {example.label} is negative")
        except DataError as error:
            raise type(error)(f"{shard.path}, record at byte {offset}: {error}") from error
        sha.update(tfrecord.record(payload))
        index.append((offset, len(payload) + tfrecord.OVERHEAD))
        if example.label < min(labels, default=example.label + 1):
            about["offset_of_lowest"] = offset
        labels[example.label] += 1
        about["first_label"] = example.first_label
        if example.class_name is not None:
            names[example.label] = example.class_name
    if not index:
        raise SetError(f"{shard.path} is empty: it holds no records; copy or make it again")
    return _finish(shard, index, sha.hexdigest(), labels, names, about)


def _finish(
    shard: Shard,
    index: list[tuple[int, int]],
    sha256: str,
    labels: Counter[int],
    names: dict[int, str],
    about: dict[str, int],
) -> dict[str, Any]:
    with replacing(shard.index) as file:
        file.write(tfrecord.index_text(index).encode())
    size = sum(size for _, size in index)
    entry = {"name": shard.name, "images": len(index), "bytes": size, "sha256": sha256}
    return write_note(shard, entry, labels, names, about)


def write_note(
    shard: Shard,
    entry: dict[str, Any],
    labels: Counter[int],
    names: dict[int, str],
    about: dict[str, int],
) -> dict[str, Any]:
    """Record that a shard is finished.

    Args:
        shard: The shard.
        entry: Its entry in the manifest.
        labels: Number of images of each label, as the labels are in the records.
        names: Class names of the labels.
        about: For existing records: `modified`, the file's time; `first_label`, the label that the
            first class usually has in records of this kind; `offset_of_lowest`, the position of the
            record with the lowest label.
    """
    note = (
        entry
        | about
        | {
            "split": shard.split,
            "labels": {str(label): count for label, count in sorted(labels.items())},
            "names": {str(label): name for label, name in sorted(names.items())},
        }
    )
    write_json(shard.note, note)
    return note


def convert(encoded: bytes, conversion: Conversion) -> bytes:
    """Return the image file for the record; it is unchanged if no conversion applies."""
    shrink = conversion.short_side and min(dimensions(encoded)) > conversion.short_side
    if not shrink and not (conversion.reencode and image_kind(encoded)):
        return encoded
    image = Image.fromarray(decode_pil(encoded))
    if shrink:
        scale = conversion.short_side / min(image.size)
        size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    try:
        image.save(buffer, "JPEG", quality=conversion.quality)
    except OSError as error:  # libjpeg accepts sides of at most 65,500 pixels
        raise DataError(
            f"cannot be written as a JPEG of {image.width}x{image.height} pixels ({error}); "
            "leave it out with --exclude"
        ) from error
    return buffer.getvalue()
