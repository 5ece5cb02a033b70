"""Unusual, huge and damaged files: whatever a decoder raises, the error names the file."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data import DataError
from data.check.__main__ import main as check
from data.make_tfrecords.__main__ import main as make_tfrecords
from data.make_tfrecords.shards import Conversion, convert
from data.pixels import decode as decoding
from data.pixels.decode import decode, decode_pil, dimensions, image_kind, jpeg_size
from data.sources.imagenet import ImageNet, ImageNetDali
from data_fixtures import Share, photograph, write_tree


def jpeg(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def of_subsampling_441() -> bytes:
    """Return a JPEG whose luminance has 1x4 blocks for each of chrominance.

    A file of 64x64 pixels in 4:2:0 (2x2 blocks) has as many units, so only its header differs.
    """
    data = bytearray(jpeg(photograph(64, 64, seed=1), subsampling=2))
    header = data.index(b"\xff\xc0")
    assert data[header + 11] == 0x22
    data[header + 11] = 0x14
    return bytes(data)


def box(height, width):
    return height // 4, width // 4, height // 2, width // 2


def test_a_jpeg_of_4_4_1_is_read_as_by_pil(tmp_path, capsys):
    encoded = of_subsampling_441()
    expected = decode_pil(encoded)
    assert np.array_equal(decode(encoded), expected)
    assert np.array_equal(decode(encoded, box), expected[16:48, 16:48])
    assert dimensions(encoded) == (64, 64)
    assert jpeg_size(encoded) is None  # DALI gets its pixels
    roots = [str(write_tree(tmp_path / split, {"ant": 2, "bee": 2})) for split in ("train", "val")]
    for root in roots:
        for name in ("ant/000.jpg", "bee/001.jpg"):
            (tmp_path / root / name).write_bytes(encoded)
    folders = ["--train-dir", roots[0], "--val-dir", roots[1], "--workers", "0"]
    assert check(folders) == 0
    assert (
        make_tfrecords([*folders, "--data-dir", str(tmp_path / "out"), "--short-side", "32"]) == 0
    )
    sources = [
        ImageNet(*roots, image_size=16),
        ImageNet(records=str(tmp_path / "out"), image_size=16),
    ]
    pytest.importorskip("nvidia.dali")
    sources.append(ImageNetDali(*roots, image_size=16, reader="folder"))
    for source in sources:
        loader = source.train_loader(Share(effective_batch_size=4), workers=0)
        for epoch in range(2):
            assert sum(len(labels) for _, labels in loader.epoch(epoch)) == 4
        loader.close()


@pytest.mark.parametrize(
    "error", [KeyError(6), ZeroDivisionError(), MemoryError(), SystemError("x")]
)
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error):
    class Broken:
        def decode_jpeg_header(self, _):
            raise error

        decode_jpeg = decode_jpeg_header

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(decoding, "simplejpeg", Broken())
    monkeypatch.setattr(Image, "open", broken)
    root = str(write_tree(tmp_path / "train", {"ant": 2, "bee": 2}))
    source = ImageNet(root, root, image_size=16)
    with pytest.raises(DataError, match=rf"{root}/ant/000\.jpg cannot be decoded: ."):
        list(source.val_loader(Share(), workers=0))


def header_of(height: int, width: int) -> bytes:
    """Return a JPEG that claims to have this many pixels, and holds far fewer."""
    data = bytearray(jpeg(photograph(16, 16, seed=1)))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def png_header(height: int, width: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("make", [header_of, png_header])
def test_one_limit_holds_for_all_formats_and_readers(make):
    """PIL's own limit of 179 million pixels does not count: only some readers use PIL."""
    encoded = make(14000, 13000)
    assert dimensions(encoded) == (14000, 13000)
    assert image_kind(encoded) == (None if make is header_of else "not a JPEG")
    encoded = make(17000, 17000)  # PIL warns from half of the limit on
    assert image_kind(encoded) == (None if make is header_of else "not a JPEG")
    encoded = make(60000, 60000)
    for read in (decode, lambda data: decode(data, box), decode_pil, dimensions):
        with pytest.raises(DataError, match="it has more than 536,870,912 pixels"):
            read(encoded)
    if make is header_of:
        with pytest.raises(DataError, match="it has more than"):
            jpeg_size(encoded)


def test_large_plain_jpegs_are_read_and_not_reencoded():
    """180 million pixels: PIL by itself warns from 89 million on, and refuses more than 179."""
    size = (13400, 13400)
    encoded = jpeg(np.zeros((*size, 3), np.uint8), quality=10)
    assert image_kind(encoded) is None
    assert convert(encoded, Conversion(reencode=True, short_side=0, quality=90)) is encoded
    assert decode(encoded).shape == (*size, 3)
    small = convert(encoded, Conversion(reencode=True, short_side=100, quality=90))
    assert dimensions(small) == (100, 100)
