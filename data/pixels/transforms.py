"""Pixels: decoding, the boxes to crop, and resizing, for training and for validation.

The boxes are torchvision's: given the same random stream, `crop_box` returns what
``RandomResizedCrop.get_params`` returns. The pixels are, bit for bit, those of torchvision's v2
tensor transforms for the same boxes (uint8, bilinear, antialiased), or, with ``exact_pil``, those
of its transforms of PIL images. Where nvImageCodec is installed (DALI brings it), of a JPEG only
what the box needs is decoded, to the same pixels.

An image is a uint8 array of shape (height, width, 3); a transformed one is a uint8 tensor of shape
(3, height, width).
"""

from __future__ import annotations

import functools
import io
import math
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Generator, Tensor

from data import DataError

try:
    import simplejpeg
except ImportError:  # PIL alone gives the same pixels, more slowly
    simplejpeg = None

# For CMYK simplejpeg has a conversion of its own, off PIL's by one.
_FAST_COLOURS = ("YCbCr", "Gray", "RGB")

# The first version whose regions were compared with whole images, bit for bit.
_NVIMGCODEC = (0, 9)

# Where a JPEG that is there to its end has the marker that says so: in its last bytes, before what
# cameras and file systems may have padded it with.
_END_OF_IMAGE = b"\xff\xd9"
_TAIL = 64

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # (top, left, height, width)

# From an image's (height, width) to the box of it that is wanted; asked once for each image.
Choose = Callable[[int, int], Box]


def whole(height: int, width: int) -> Box:
    """Choose all of an image."""
    return 0, 0, height, width


def cut(pixels: Pixels, box: Box) -> Pixels:
    """Return a box of an image, without a copy."""
    top, left, height, width = box
    return pixels[top : top + height, left : left + width]


def decode(encoded: bytes, choose: Choose = whole) -> Pixels:
    """Decode an image file's bytes to RGB, or the box of it that is chosen.

    JPEGs go through libjpeg-turbo (simplejpeg, or nvImageCodec for a box). What it does not read or
    warns about (CMYK, a PNG called .JPEG, other formats, damage) goes through PIL, whose word is
    final.

    Raises:
        DataError: PIL cannot read it either.
    """
    decode_region = None if choose is whole else region_decoder()
    size = jpeg_size(encoded) if decode_region else None
    if decode_region is None or size is None:
        pixels = _decode_all(encoded)
        return cut(pixels, choose(*pixels.shape[:2]))
    box = choose(*size)
    region = None if box == whole(*size) else decode_region(encoded, box)
    return cut(_decode_all(encoded), box) if region is None else region


@functools.cache
def region_decoder() -> Callable[[bytes, Box], Pixels | None] | None:
    """Return a function that decodes a box of what `jpeg_size` knows; None without nvImageCodec.

    It gives None for what it cannot decode. One decoder, on the CPU, serves the process.
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
    one_thread = threading.Lock()  # two at once end the process

    def decode_region(encoded: bytes, box: Box) -> Pixels | None:
        top, left, height, width = box
        if width == 1:  # libjpeg-turbo interpolates no colours in so narrow a strip
            return None
        region = nvimgcodec.Region(top, left, top + height, left + width)
        with one_thread:
            stream = nvimgcodec.CodeStream(encoded).get_sub_code_stream(region=region)
            image = decoder.decode(stream, params=upright)
        return None if image is None else np.asarray(image)

    return decode_region


def _decode_all(encoded: bytes) -> Pixels:
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
            warnings.simplefilter(
                "ignore"
            )  # ImageNet's own files carry corrupt EXIF, which is not read here
            image = Image.open(io.BytesIO(encoded))
            if image.mode.startswith(("I", "F")):
                raise ValueError("grey levels beyond 255, which PIL would cut off; use 8 bits")
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:  # whose message is an address in memory
        raise DataError("cannot be decoded: no image format that PIL knows") from error
    except Exception as error:  # each of PIL's formats has exceptions of its own for damaged files
        raise DataError(f"cannot be decoded: {error}") from error


def image_kind(encoded: bytes) -> str | None:
    """Say what is odd about an image file: ``not a JPEG``, ``CMYK`` or other mode, ``EXIF``.

    Returns:
        None for an RGB or grey JPEG whose EXIF block, if any, can be read.
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
    except Exception:  # PIL's warnings about EXIF, and what its parser stumbles over
        return "EXIF"
    return None


def jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG that can be decoded in part: of usual colours, and whole.

    Returns:
        None for all that `decode` has to see the whole of: other images, and JPEGs without the
        marker that ends them, whose damage a crop above it would not meet.
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
        DataError: There is none that PIL can read.
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
        raise DataError("cannot be decoded: no image format that PIL knows") from error
    except Exception as error:  # as in decode_pil
        raise DataError(f"cannot be decoded: {error}") from error
    return height, width


def crop_box(
    height: int,
    width: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: Generator,
) -> Box:
    """Draw the box of a random resized crop (Szegedy et al., 2015, as torchvision samples it).

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        area: Least and greatest share of the image's area; drawn uniformly.
        aspect: Least and greatest width / height; its logarithm is drawn uniformly.
        generator: Two draws for each of at most ten attempts, and two for the place of a box that
            fits.

    Returns:
        (top, left, height, width). If no attempt fits: the central box whose aspect is the nearest
        allowed.
    """
    low, high = _logarithms(aspect)
    for _ in range(10):
        target = height * width * _uniform(*area, generator).item()
        ratio = torch.exp(_uniform(low, high, generator)).item()
        box_width = round(math.sqrt(target * ratio))
        box_height = round(math.sqrt(target / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = torch.randint(height - box_height + 1, (1,), generator=generator).item()
            left = torch.randint(width - box_width + 1, (1,), generator=generator).item()
            return int(top), int(left), box_height, box_width
    box_height, box_width = height, width
    if width / height < aspect[0]:
        box_height = round(width / aspect[0])
    elif width / height > aspect[1]:
        box_width = round(height * aspect[1])
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


@functools.cache
def _logarithms(aspect: tuple[float, float]) -> list[float]:
    return torch.log(torch.tensor(aspect)).tolist()  # in float32, as torchvision's


def _uniform(low: float, high: float, generator: Generator) -> Tensor:
    return torch.empty(1).uniform_(low, high, generator=generator)


def resize(pixels: Pixels, height: int, width: int) -> Tensor:
    """Resize with torch's antialiased bilinear filter on uint8.

    Returns:
        (3, height, width), in channels-last memory: 1.5 times faster to make than channels-first.
    """
    image = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)
    if image.shape[1:] == (height, width):
        return image
    # torch takes a batch of one for channels-first whatever its strides, unless the stride of the
    # batch says otherwise.
    batch = image.as_strided((1, *image.shape), (image.numel(), *image.stride()))
    return torch.nn.functional.interpolate(
        batch, size=(height, width), mode="bilinear", align_corners=False, antialias=True
    )[0]


def resize_pil(pixels: Pixels, height: int, width: int) -> Tensor:
    """Resize with PIL's bilinear filter; result as of `resize`."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


@dataclass(frozen=True)
class TrainTransform:
    """A random box of the image, resized to a square and perhaps mirrored.

    Attributes:
        size: Side of the result in pixels.
        area: Least and greatest share of the image's area.
        aspect: Least and greatest width / height.
        flip: Mirror every second image, by the generator's coin.
        exact_pil: Resize with PIL.
    """

    size: int
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    exact_pil: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a transformed image."""
        return 3, self.size, self.size

    def box(self, height: int, width: int, generator: Generator) -> Box:
        """Draw the box to take from an image."""
        return crop_box(height, width, self.area, self.aspect, generator)

    def mirrored(self, generator: Generator) -> bool:
        """Draw, after the box, whether to mirror it."""
        return self.flip and torch.rand(1, generator=generator).item() < 0.5

    def __call__(self, pixels: Pixels, generator: Generator) -> Tensor:
        """Transform the box of an image."""
        image = (resize_pil if self.exact_pil else resize)(pixels, self.size, self.size)
        return image.flip(-1) if self.mirrored(generator) else image


class _OfTheWhole:
    """A transform that takes all of an image."""

    def box(self, height: int, width: int, generator: Generator) -> Box:
        """Return the box to take from an image."""
        return whole(height, width)


@dataclass(frozen=True)
class ValTransform(_OfTheWhole):
    """The shorter side resized, then the central square.

    Attributes:
        resize: Length of the shorter side after resizing, in pixels; at least `size`.
        size: Side of the result in pixels.
        exact_pil: Resize with PIL.
    """

    resize: int
    size: int
    exact_pil: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a transformed image."""
        return 3, self.size, self.size

    def place(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the (height, width) to resize an image to, and (top, left) of the square."""
        if height <= width:
            height, width = self.resize, int(self.resize * width / height)
        else:
            height, width = int(self.resize * height / width), self.resize
        return height, width, round((height - self.size) / 2), round((width - self.size) / 2)

    def __call__(self, pixels: Pixels, generator: Generator) -> Tensor:
        """Transform one image; nothing here is random."""
        height, width, top, left = self.place(pixels.shape[0], pixels.shape[1])
        image = (resize_pil if self.exact_pil else resize)(pixels, height, width)
        return image[:, top : top + self.size, left : left + self.size]


@dataclass(frozen=True)
class PaddedCrop(_OfTheWhole):
    """A square out of the image with a black border, perhaps mirrored and turned.

    Given the same random stream it is torchvision's RandomCrop, RandomHorizontalFlip and
    RandomRotation, one after the other, to the bit.

    Attributes:
        size: Side of image and result in pixels.
        padding: Width of the border in pixels.
        flip: Mirror every second image.
        rotation: Turn by up to this angle, in degrees.
    """

    size: int
    padding: int
    flip: bool
    rotation: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a transformed image."""
        return 3, self.size, self.size

    def __call__(self, pixels: Pixels, generator: Generator) -> Tensor:
        """Transform one image."""
        border = self.padding
        padded = np.pad(pixels, ((border, border), (border, border), (0, 0)))
        top = left = 0
        if border:
            places = 2 * border + 1
            top = int(torch.randint(places, (1,), generator=generator).item())
            left = int(torch.randint(places, (1,), generator=generator).item())
        image = torch.from_numpy(padded).permute(2, 0, 1)
        image = image[:, top : top + self.size, left : left + self.size]
        if self.flip and torch.rand(1, generator=generator).item() < 0.5:
            image = image.flip(-1)
        if self.rotation:
            from torchvision.transforms import functional

            angle = _uniform(-self.rotation, self.rotation, generator).item()
            image = functional.rotate(image, angle)
        return image


@dataclass(frozen=True)
class TwoViews(_OfTheWhole):
    """The two distorted views of Barlow Twins (Zbontar et al., 2021, appendix A).

    Attributes:
        size: Side of each view in pixels.
    """

    size: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of a transformed image."""
        return 2, 3, self.size, self.size

    def __call__(self, pixels: Pixels, generator: Generator) -> Tensor:
        """Transform one image."""
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        # torchvision draws from the global generator alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**63 - 1, (1,), generator=generator).item()))
            return torch.stack(
                [
                    _distortion(self.size, blur=1.0, solarize=0.0)(image),
                    _distortion(self.size, blur=0.1, solarize=0.2)(image),
                ]
            )


@functools.cache
def _distortion(size: int, blur: float, solarize: float) -> Callable[[Tensor], Tensor]:
    from torchvision import transforms

    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    kernel = max(size // 20 * 2 + 1, 3)  # a tenth of the image, as in SimCLR (Chen et al., 2020)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                size, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True
            ),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([transforms.GaussianBlur(kernel, (0.1, 2.0))], p=blur),
            transforms.RandomSolarize(threshold=128, p=solarize),
        ]
    )
