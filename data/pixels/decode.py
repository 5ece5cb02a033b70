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

# Images of more pixels than this are refused, whatever decodes them: 1.6 GB as RGB. PIL refuses
# images of more than twice its own number, which would be 179 million pixels.
MAX_PIXELS = 2**29
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2

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
        DataError: PIL cannot read it either, or the image has more than `MAX_PIXELS` pixels.
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
        try:
            with one_thread:
                stream = nvimgcodec.CodeStream(encoded).get_sub_code_stream(region=region)
                image = decoder.decode(stream, params=upright)
        except Exception:  # the decoder of full images decides whether the file is readable
            return None
        return None if image is None else np.asarray(image)

    return decode_region


def _decode_full(encoded: bytes) -> Pixels:
    header = _jpeg_header(encoded)
    if header is not None and header[2] in _FAST_COLOURS:
        try:
            return simplejpeg.decode_jpeg(encoded, "RGB")
        except Exception:  # damage, or a JPEG of a kind that simplejpeg does not know
            pass
    return decode_pil(encoded)


def _jpeg_header(encoded: bytes) -> tuple[int, int, str] | None:
    """Return (height, width, colours) of a JPEG; None for files that simplejpeg cannot read.

    Raises:
        DataError: The image is too large.
    """
    if simplejpeg is None or encoded[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
    except Exception:  # a subsampling of 4:4:1 raises KeyError, for example
        return None
    _refuse_huge(height, width)
    return height, width, colours


def _refuse_huge(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise _too_large()


def _too_large() -> DataError:
    return DataError(f"cannot be decoded: it has more than {MAX_PIXELS:,} pixels, the limit")


def decode_pil(encoded: bytes) -> Pixels:
    """Decode with PIL alone, as torchvision's ``pil_loader`` does."""
    try:
        with warnings.catch_warnings():
            # Some files of ImageNet itself have corrupt EXIF, which is not read here.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(encoded))
            _refuse_huge(image.height, image.width)
            if image.mode.startswith(("I", "F")):
                raise ValueError("grey levels beyond 255, which PIL would clip; use 8 bits")
            return np.asarray(image.convert("RGB"))
    except DataError:
        raise
    except Exception as error:  # for damaged files, each of PIL's formats has its own exceptions
        raise _undecodable(error) from error


def _undecodable(error: Exception) -> DataError:
    if isinstance(error, UnidentifiedImageError):  # its message is an address in memory
        return DataError("cannot be decoded: PIL does not recognise the image format")
    if isinstance(error, Image.DecompressionBombError):
        return _too_large()
    return DataError(f"cannot be decoded: {str(error) or type(error).__name__}")


def image_kind(encoded: bytes) -> str | None:
    """Return what is unusual about an image file: ``not a JPEG``, ``CMYK`` or another mode, ``EXIF``.

    Returns:
        None for an RGB or grayscale JPEG whose EXIF block, if any, can be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a large image is fine
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
    header = _jpeg_header(encoded)
    return header[:2] if header is not None and header[2] in ("YCbCr", "Gray") else None


def dimensions(encoded: bytes) -> tuple[int, int]:
    """Return (height, width) from an image file's header.

    Raises:
        DataError: PIL can read no header, or the image is too large.
    """
    header = _jpeg_header(encoded)
    if header is not None:
        return header[:2]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            width, height = Image.open(io.BytesIO(encoded)).size
    except Exception as error:  # as in decode_pil
        raise _undecodable(error) from error
    _refuse_huge(height, width)
    return height, width
