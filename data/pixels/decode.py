"""Decoding image files to RGB pixels: a full image, or only the box that is needed.

JPEGs are decoded with libjpeg-turbo (simplejpeg). If nvImageCodec is installed (DALI depends on
it), only the part of a JPEG that a box needs is decoded, to the same pixels. Everything else is
decoded with PIL.
"""

from __future__ import annotations

import functools
import io
import threading
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

from data import DataError
from data.pixels.boxes import Box, CropFn, Pixels, crop, full_image

try:
    import simplejpeg
except ImportError:  # PIL alone gives the same pixels, more slowly
    simplejpeg = None

# simplejpeg has its own conversion of CMYK, which differs from PIL's by one.
_FAST_COLOURS = ("YCbCr", "Gray", "RGB")

# The first version whose regions were compared with full images, bit for bit.
_NVIMGCODEC = (0, 9)

# A complete JPEG has its end marker among its last bytes, before any padding that cameras and file
# systems may have appended.
_END_OF_IMAGE = b"\xff\xd9"
_TAIL = 64


def decode(encoded: bytes, crop_fn: CropFn = full_image) -> Pixels:
    """Decode the bytes of an image file to RGB, or only the box that `crop_fn` returns.

    JPEGs go through libjpeg-turbo (simplejpeg, or nvImageCodec for a box). Files that it cannot
    read or warns about (CMYK, a PNG called .JPEG, other formats, damage) go through PIL, which
    decides whether they are readable.

    Raises:
        DataError: PIL cannot read it either.
    """
    decode_region = None if crop_fn is full_image else region_decoder()
    size = jpeg_size(encoded) if decode_region else None
    if decode_region is None or size is None:
        pixels = _decode_full(encoded)
        return crop(pixels, crop_fn(*pixels.shape[:2]))
    box = crop_fn(*size)
    region = None if box == full_image(*size) else decode_region(encoded, box)
    return crop(_decode_full(encoded), box) if region is None else region


@functools.cache
def region_decoder() -> Callable[[bytes, Box], Pixels | None] | None:
    """Return a function that decodes a box of a JPEG; None without nvImageCodec.

    The function accepts files for which `jpeg_size` returns a size. It returns None for a file that
    it cannot decode. All threads of the process share one decoder, which runs on the CPU.
    """
    try:
        import nvidia.nvimgcodec as nvimgcodec
    except ImportError:
        return None
    if simplejpeg is None or tuple(map(int, nvimgcodec.__version__.split(".")[:2])) < _NVIMGCODEC:
        return None
    decoder = nvimgcodec.Decoder(
        device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=1,
        backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
    )
    upright = nvimgcodec.DecodeParams(apply_exif_orientation=False)
    one_thread = threading.Lock()  # the process crashes if two threads use the decoder at once

    def decode_region(encoded: bytes, box: Box) -> Pixels | None:
        top, left, height, width = box
        if width == 1:  # libjpeg-turbo does not interpolate colours in so narrow a strip
            return None
        region = nvimgcodec.Region(top, left, top + height, left + width)
        with one_thread:
            stream = nvimgcodec.CodeStream(encoded).get_sub_code_stream(region=region)
            image = decoder.decode(stream, params=upright)
        return None if image is None else np.asarray(image)

    return decode_region


def _decode_full(encoded: bytes) -> Pixels:
    if simplejpeg is not None and encoded[:2] == b"\xff\xd8":
        try:
            if simplejpeg.decode_jpeg_header(encoded)[2] in _FAST_COLOURS:
                return simplejpeg.decode_jpeg(encoded, "RGB")
        except ValueError:
            pass
    return decode_pil(encoded)


def decode_pil(encoded: bytes) -> Pixels:
    """Decode with PIL alone, as torchvision's ``pil_loader`` does."""
    try:
        with warnings.catch_warnings():
            # Some files of ImageNet itself have corrupt EXIF, which is not read here.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(encoded))
            if image.mode.startswith(("I", "F")):
                raise ValueError("grey levels beyond 255, which PIL would clip; use 8 bits")
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:  # its message is an address in memory
        raise DataError("cannot be decoded: PIL does not recognise the image format") from error
    except Exception as error:  # for damaged files, each of PIL's formats has its own exceptions
        raise DataError(f"cannot be decoded: {error}") from error


def image_kind(encoded: bytes) -> str | None:
    """Return what is unusual about an image file: ``not a JPEG``, ``CMYK`` or another mode, ``EXIF``.

    Returns:
        None for an RGB or grayscale JPEG whose EXIF block, if any, can be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            image = Image.open(io.BytesIO(encoded))
            if image.format != "JPEG":
                return "not a JPEG"
            if image.mode not in ("RGB", "L"):
                return image.mode
            image.getexif()
    except Exception:  # PIL's warnings about EXIF, and the errors of its EXIF parser
        return "EXIF"
    return None


def jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Return (height, width) of an intact YCbCr or grayscale JPEG, which can be decoded in part.

    Returns:
        None for files that must be decoded in full: other images, and JPEGs without the end marker,
        because decoding a box above the damage would not reveal it.
    """
    if encoded[:2] != b"\xff\xd8" or _END_OF_IMAGE not in encoded[-_TAIL:]:
        return None
    if simplejpeg is None:
        return dimensions(encoded) if image_kind(encoded) in (None, "EXIF") else None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return None
    return (height, width) if colours in ("YCbCr", "Gray") else None


def dimensions(encoded: bytes) -> tuple[int, int]:
    """Return (height, width) from an image file's header.

    Raises:
        DataError: PIL can read no header.
    """
    if simplejpeg is not None and encoded[:2] == b"\xff\xd8":
        try:
            return simplejpeg.decode_jpeg_header(encoded)[:2]
        except ValueError:
            pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            width, height = Image.open(io.BytesIO(encoded)).size
    except UnidentifiedImageError as error:
        raise DataError("cannot be decoded: PIL does not recognise the image format") from error
    except Exception as error:  # as in decode_pil
        raise DataError(f"cannot be decoded: {error}") from error
    return height, width
