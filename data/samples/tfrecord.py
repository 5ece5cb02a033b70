"""The TFRecord format: records with checksums, their index files, and the examples inside.

A record is ``length`` (8 bytes, little-endian), the masked CRC-32C of these 8 bytes, ``length``
bytes of payload and the masked CRC-32C of the payload. An index file has one line ``offset size``
per record, with the size of the entire record; DALI's reader needs this format. The payload is a
``tf.train.Example`` in protocol-buffer encoding: a map from feature names to lists of bytes, of
floats or of integers.

ImageNet's examples hold ``image/encoded`` (the image file) and ``image/class/label`` (from 1).
Those of TensorFlow Datasets hold ``image`` and ``label`` (from 0).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from data import DataError, SetError

# First bytes of compressed files; TensorFlow writes these two formats.
_COMPRESSED = {
    b"\x1f\x8b\x08": "gzip",
    b"\x78\x01": "zlib",
    b"\x78\x9c": "zlib",
    b"\x78\xda": "zlib",
}
_DECOMPRESS = {"gzip": "gunzip < OLD > NEW", "zlib": "pigz -dz < OLD > NEW"}

Value = bytes | int | float
Feature = list[bytes] | list[int] | list[float]

_HEADER = struct.Struct("<QI")
_CRC = struct.Struct("<I")

_LONGEST_KEY = 11  # bytes of a field's number and size

OVERHEAD = _HEADER.size + _CRC.size  # bytes of a record that are not payload

IMAGE = "image/encoded"
LABEL = "image/class/label"
TFDS_IMAGE, TFDS_LABEL = "image", "label"  # TensorFlow Datasets; labels from 0
CLASS_NAME = "image/class/synset"


def masked_crc(data: bytes) -> int:
    """Return the CRC-32C of `data`, rotated and shifted as TFRecord stores it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record(payload: bytes) -> bytes:
    """Return the record that holds `payload`."""
    length = struct.pack("<Q", len(payload))
    return b"".join(
        (length, _CRC.pack(masked_crc(length)), payload, _CRC.pack(masked_crc(payload)))
    )


def payload(record: bytes, check_crc: bool = True) -> bytes:
    """Return the payload of one complete record.

    Raises:
        SetError: The record is intact, but has another length than its index file says.
        DataError: The record is damaged; checksums are verified only if `check_crc`.
    """
    if len(record) < OVERHEAD:
        raise DataError(f"a record of {len(record)} bytes is too short")
    length, length_crc = _HEADER.unpack_from(record)
    if length != len(record) - OVERHEAD:
        intact = masked_crc(record[:8]) == length_crc
        raise (SetError if intact else DataError)(
            f"a record claims to hold {length} bytes, but it has {len(record) - OVERHEAD}"
        )
    body = record[_HEADER.size : -_CRC.size]
    if check_crc:
        if masked_crc(record[:8]) != length_crc:
            raise DataError("the checksum of a record's length is wrong")
        if masked_crc(body) != _CRC.unpack_from(record, len(record) - _CRC.size)[0]:
            raise DataError("the checksum of a record is wrong")
    return body


def read_records(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, payload) of each record of a file, and verify every checksum.

    Raises:
        DataError: A record is bad; the message names the file and the record's offset.
    """
    with open(path, "rb") as file:
        offset, end = 0, os.fstat(file.fileno()).st_size
        while offset < end:
            try:
                record_bytes = _next_record(file, end - offset)
                yield offset, payload(record_bytes)
            except DataError as error:
                if offset == 0:
                    refuse_compression(path)
                raise type(error)(f"{path}, record at byte {offset}: {error}") from error
            offset += len(record_bytes)


def _next_record(file: BinaryIO, left: int) -> bytes:
    header, length = _read_header(file, left)
    return header + file.read(length + _CRC.size)


def read_length(file: BinaryIO, left: int) -> int:
    """Return the length of the payload that begins here, and verify its checksum.

    Args:
        file: Record file, at the beginning of a record. It is moved to the payload.
        left: Bytes from there to the end of the file.

    Raises:
        DataError: The header is damaged, or the file ends before the record.
    """
    return _read_header(file, left)[1]


def _read_header(file: BinaryIO, left: int) -> tuple[bytes, int]:
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise DataError("the file ends in the middle of a record")
    length, length_crc = _HEADER.unpack(header)
    if masked_crc(header[:8]) != length_crc:
        raise DataError("the checksum of a record's length is wrong")
    if length + OVERHEAD > left:
        raise DataError("the file ends in the middle of a record")
    return header, length


def refuse_compression(path: str) -> None:
    """Raise SetError if a file that does not begin with a record is compressed."""
    with open(path, "rb") as file:
        start = file.read(3)
    kind = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
    if kind:
        raise SetError(
            f"{path} is compressed with {kind}, but single records can only be read from files that "
            f"are not; decompress all of them ({_DECOMPRESS[kind]})"
        )


def read_index(path: str, file_size: int) -> NDArray[np.int64]:
    """Read an index file.

    Args:
        path: Path of the index file.
        file_size: Size of the record file in bytes.

    Returns:
        (offset, size) of each record, shape (records, 2).

    Raises:
        DataError: The records do not follow each other from the first to the last byte of the file.
    """
    fix = "; make it again with python -m data.make_tfrecords --from-tfrecords"
    try:
        with open(path, "rb") as file:
            words = file.read().split()
        numbers = np.array([int(word) for word in words], dtype=np.int64)
        index = numbers.reshape(-1, 2)
    except OSError as error:
        raise DataError(f"index file {path} cannot be read: {error.strerror}{fix}") from error
    except (ValueError, OverflowError) as error:
        raise DataError(f"index file {path} is damaged: {error}{fix}") from error
    ends = index.sum(1)
    starts = np.concatenate([[0], ends[:-1]]) if len(index) else ends
    covered = int(ends[-1]) if len(index) else 0
    if (index[:, 1] < OVERHEAD).any() or (index[:, 0] != starts).any() or covered != file_size:
        raise DataError(
            f"index file {path} does not match its record file of {file_size} bytes{fix}"
        )
    return index


def index_text(index: Sequence[tuple[int, int]]) -> str:
    """Return the contents of an index file for records at (offset, size)."""
    return "".join(f"{offset} {size}\n" for offset, size in index)


def encode_example(features: Mapping[str, Value]) -> bytes:
    """Encode a ``tf.train.Example`` of single values; features in sorted order of their names."""
    entries = []
    for name, value in sorted(features.items()):
        if isinstance(value, bytes):
            kind, packed = 1, _field(1, value)
        elif isinstance(value, float):
            kind, packed = 2, _field(1, struct.pack("<f", value))
        else:
            kind, packed = 3, _field(1, _varint(value & (2**64 - 1)))
        feature = _field(kind, packed)
        entries.append(_field(1, _field(1, name.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries))


def decode_example(example: bytes) -> dict[str, Feature]:
    """Decode a ``tf.train.Example``.

    Raises:
        DataError: The bytes are not an example.
    """
    try:
        features = {}
        for _, body in _fields(memoryview(example), wanted=1):
            for _, entry in _fields(body, wanted=1):
                parts = dict(_fields(entry))
                features[bytes(parts[1]).decode()] = _feature(parts.get(2, memoryview(b"")))
        return features
    except (KeyError, ValueError, IndexError, struct.error) as error:
        raise DataError(f"a record does not hold a tf.train.Example ({error})") from error


def small_features(file: BinaryIO, length: int, limit: int) -> dict[str, Feature]:
    """Decode the features of an example that take fewer than `limit` bytes each; skip the others.

    Args:
        file: File at the beginning of an example.
        length: Bytes of the example.
        limit: Size in bytes.

    Raises:
        DataError, ValueError, IndexError, KeyError: The bytes are not an example.
    """
    start = file.tell()
    position, size = _enter(file.read(_LONGEST_KEY))
    if position + size != length:
        raise ValueError("its size is wrong")
    features: dict[str, Feature] = {}
    while position < length:
        file.seek(start + position)
        body, size = _enter(file.read(_LONGEST_KEY))
        if size < limit:
            file.seek(start + position + body)
            features |= decode_example(_field(1, _field(1, file.read(size))))
        position += body + size
    return features


def _enter(data: bytes) -> tuple[int, int]:
    """Return where the content of a length-delimited field 1 begins, and its size."""
    if data[0] != 1 << 3 | 2:
        raise ValueError("an unexpected field")
    size, start = _read_varint(memoryview(data), 1)
    return start, size


def _feature(message: memoryview) -> Feature:
    feature: Feature = []
    for kind, body in _fields(message):
        values = [value for _, value in _fields(body, wanted=1)]
        if kind == 1:
            feature = [bytes(value) for value in values]
        elif kind == 2:
            feature = [x for value in values for (x,) in struct.iter_unpack("<f", value)]
        elif kind == 3:
            feature = [_signed(x) for value in values for x in _varints(value)]
    return feature


def _varints(packed: memoryview) -> Iterator[int]:
    position = 0
    while position < len(packed):
        number, position = _read_varint(packed, position)
        yield number


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _field(number: int, value: bytes) -> bytes:
    """Encode a length-delimited field (wire type 2)."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")


def _fields(message: memoryview, wanted: int | None = None) -> Iterator[tuple[int, memoryview]]:
    """Yield (field number, encoded value) of each field, or only of the field `wanted`."""
    position = 0
    while position < len(message):
        key, position = _read_varint(message, position)
        wire = key & 7
        end = position
        if wire == 0:
            _, end = _read_varint(message, position)
        elif wire == 2:
            size, position = _read_varint(message, position)
            end = position + size
        elif wire in (1, 5):
            end = position + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"wire type {wire}")
        if end > len(message):
            raise ValueError("a field is cut short")
        if wanted is None or key >> 3 == wanted:
            yield key >> 3, message[position:end]
        position = end
