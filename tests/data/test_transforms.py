"""Decoding, boxes and resizing equal torchvision's and PIL's, bit for bit."""

from __future__ import annotations

import functools
import io
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from data import DataError
from data.pixels import decode as decoding
from data.pixels.augment import PaddedCrop, TwoViews
from data.pixels.boxes import crop, random_box
from data.pixels.decode import decode, decode_pil, jpeg_size
from data.pixels.transforms import TrainTransform, ValTransform
from data_fixtures import photograph

SHAPES = [(375, 500), (500, 375), (224, 224), (64, 333), (300, 40), (31, 17), (1, 1)]


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def as_rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def transformed(transform, pixels: np.ndarray, stream: torch.Generator) -> torch.Tensor:
    """Return what a loader makes from an image."""
    box = transform.box(*pixels.shape[:2], stream)
    return transform(crop(pixels, box), stream)


@given(
    height=st.integers(1, 600),
    width=st.integers(1, 600),
    low=st.floats(0.01, 1.0),
    high=st.floats(0.01, 1.0),
    narrow=st.floats(0.3, 3.0),
    wide=st.floats(0.3, 3.0),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=300, deadline=None)
def test_boxes_are_torchvisions_for_the_same_stream(height, width, low, high, narrow, wide, seed):
    area, aspect = sorted((low, high)), sorted((narrow, wide))
    torch.manual_seed(seed)
    image = torch.empty(3, height, width)
    expected = torchvision.transforms.RandomResizedCrop.get_params(image, area, aspect)
    assert random_box(height, width, tuple(area), tuple(aspect), generator(seed)) == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exact_pil", [False, True], ids=["tensor", "pil"])
@pytest.mark.parametrize("side", [32, 224])
def test_training_pixels_are_torchvisions(shape, exact_pil, side):
    pixels = photograph(*shape, seed=1)
    reference = v2.Compose([v2.RandomResizedCrop(side, antialias=True), v2.RandomHorizontalFlip()])
    ours = TrainTransform(side, exact_pil=exact_pil)
    for seed in range(8):
        torch.manual_seed(seed)
        if exact_pil:
            expected = v2.functional.pil_to_tensor(reference(Image.fromarray(pixels)))
        else:
            expected = reference(torch.from_numpy(pixels).permute(2, 0, 1))
        assert torch.equal(transformed(ours, pixels, generator(seed)), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exact_pil", [False, True], ids=["tensor", "pil"])
@pytest.mark.parametrize(("resize", "side"), [(256, 224), (32, 32), (37, 32), (255, 224)])
def test_validation_pixels_are_torchvisions(shape, exact_pil, resize, side):
    pixels = photograph(*shape, seed=2)
    reference = v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(side)])
    if exact_pil:
        expected = v2.functional.pil_to_tensor(reference(Image.fromarray(pixels)))
    else:
        expected = reference(torch.from_numpy(pixels).permute(2, 0, 1))
    actual = transformed(ValTransform(resize, side, exact_pil), pixels, generator(0))
    assert torch.equal(actual, expected)


def test_crop_area_aspect_and_flip_do_what_they_say():
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, :20] = 255  # the left half is white
    full = TrainTransform(40, area=(1.0, 1.0), aspect=(1.0, 1.0), flip=False)
    images = [transformed(full, pixels, generator(seed)) for seed in range(20)]
    assert all(torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1)) for image in images)
    flipping = TrainTransform(40, area=(1.0, 1.0), aspect=(1.0, 1.0))
    mirrored = sum(
        int(transformed(flipping, pixels, generator(seed))[0, 0, 0]) == 0 for seed in range(400)
    )
    assert 160 < mirrored < 240  # 200 expected, standard deviation 10


def test_resized_images_lie_in_channels_last_memory():
    image = TrainTransform(32, flip=False)(photograph(60, 50, seed=3), generator(0))
    assert image.stride() == (1, 96, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"keep_rgb": True},
     {"progressive": True}],
    ids=["444", "422", "420", "rgb", "progressive"],
)  # fmt: skip
def test_jpegs_decode_to_pils_pixels(mode, options):
    data = encoded(Image.fromarray(photograph(75, 101, seed=4)).convert(mode), **options)
    expected = as_rgb(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode(data), expected)
    assert np.array_equal(decode_pil(data), expected)


def test_the_fast_decoder_is_used_and_pil_gives_the_same_without_it(monkeypatch):
    data = encoded(Image.fromarray(photograph(75, 101, seed=5)))
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode_pil", lambda _: pytest.fail("PIL was used"))
        fast = decode(data)
    monkeypatch.setattr(decoding, "simplejpeg", None)
    assert np.array_equal(decode(data), fast)


@pytest.fixture
def regions():
    decoder = decoding.region_decoder()
    if decoder is None:
        pytest.skip("nvImageCodec 0.9 is not installed: it comes with DALI")
    return decoder


def boxes(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Return boxes at every border, strips of one pixel, and 60 random ones."""
    rng = np.random.default_rng(height)
    tops, lefts = rng.integers(0, (height, width), (60, 2)).T
    found = [
        (int(y), int(x), int(rng.integers(1, height - y + 1)), int(rng.integers(1, width - x + 1)))
        for y, x in zip(tops, lefts, strict=True)
    ]
    for h, w in [(1, 1), (height, 1), (1, width), (min(2, height), min(2, width))]:
        found += [(y, x, h, w) for y in (0, height - h) for x in (0, width - w)]
    found += [(0, 0, height, width - 1), (1, 0, height - 1, width)] if height * width > 1 else []
    return [box for box in found if box[2] and box[3]]


@pytest.mark.parametrize("shape", [(375, 500), (97, 131), (64, 48), (17, 9), (2, 300), (1, 1)])
@pytest.mark.parametrize(
    "options",
    [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True},
     {"restart_marker_blocks": 3}, {"restart_marker_rows": 1}, {"mode": "L"}],
    ids=["444", "422", "420", "progressive", "restarts", "restarts of rows", "grey"],
)  # fmt: skip
def test_a_box_decoded_by_itself_equals_that_of_the_full_image(regions, shape, options):
    image = Image.fromarray(photograph(*shape, seed=12)).convert(options.get("mode", "RGB"))
    data = encoded(image, **{name: value for name, value in options.items() if name != "mode"})
    pixels = as_rgb(Image.open(io.BytesIO(data)))
    for box in boxes(*shape):
        assert np.array_equal(decode(data, lambda *_, box=box: box), crop(pixels, box)), box


def test_only_the_box_is_decoded_and_the_full_image_without_nvimgcodec(regions, monkeypatch):
    turned = Image.Exif()
    turned[0x0112] = 6  # asks for a rotation by a right angle, which torchvision ignores
    data = encoded(Image.fromarray(photograph(75, 101, seed=5)), exif=turned)
    crop_fn = functools.partial(TrainTransform(32).box, generator=generator(0))
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_decode_full", lambda _: pytest.fail("all was decoded"))
        only_box = decode(data, crop_fn)
    monkeypatch.setattr(decoding, "region_decoder", lambda: None)
    crop_fn.keywords["generator"].manual_seed(0)
    assert np.array_equal(decode(data, crop_fn), only_box)


def test_an_older_nvimgcodec_is_not_trusted(regions, monkeypatch):
    monkeypatch.setattr("nvidia.nvimgcodec.__version__", "0.8.1")
    assert decoding.region_decoder.__wrapped__() is None


def test_one_thread_at_a_time_decodes_regions(regions, monkeypatch):
    class Decoder:
        busy = False

        def __init__(self, **_):
            pass

        def decode(self, stream, params):
            assert not self.busy
            self.busy = True
            time.sleep(0.01)
            self.busy = False
            return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr("nvidia.nvimgcodec.Decoder", Decoder)
    decode_region = decoding.region_decoder.__wrapped__()
    data = encoded(Image.fromarray(photograph(20, 30, seed=5)))
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(lambda _: decode_region(data, (0, 0, 2, 2)), range(8)))) == 8


def test_damage_below_the_box_is_found(regions):
    data = encoded(Image.fromarray(photograph(64, 64, seed=8)))
    with pytest.raises(DataError, match="cannot be decoded"):
        decode(data[:-8], lambda *_: (0, 0, 8, 8))


def test_if_the_region_decoder_gives_up_the_full_image_is_decoded(monkeypatch):
    monkeypatch.setattr(decoding, "region_decoder", lambda: lambda data, box: None)
    data = encoded(Image.fromarray(photograph(64, 64, seed=8)))
    assert np.array_equal(decode(data, lambda *_: (3, 4, 20, 30)), decode(data)[3:23, 4:34])


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP", "GIF"])
def test_other_formats_are_read_whatever_the_name(format):
    data = encoded(Image.fromarray(photograph(20, 30, seed=6)), format)
    assert np.array_equal(decode(data), as_rgb(Image.open(io.BytesIO(data))))


def test_junk_after_the_image_and_corrupt_exif_are_harmless():
    image = Image.fromarray(photograph(20, 30, seed=7))
    data = encoded(image, exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff")
    assert np.array_equal(decode(data + b"junk"), decode(encoded(image)))


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: b"not an image", lambda data: data[: len(data) // 2],
     lambda data: data[:3], lambda data: b"\x00" * len(data)],
    ids=["empty", "text", "half", "three bytes", "zeros"],
)  # fmt: skip
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_damage_is_an_error_and_never_grey_pixels(damage, format):
    data = damage(encoded(Image.fromarray(photograph(64, 64, seed=8)), format))
    with pytest.raises(DataError, match="cannot be decoded"):
        decode(data)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_levels_beyond_255_are_refused_and_not_clipped(format):
    data = encoded(Image.fromarray(np.arange(300, 700, dtype=np.uint16).reshape(20, 20)), format)
    with pytest.raises(DataError, match="cannot be decoded: grey levels beyond 255"):
        decode(data)


@pytest.mark.parametrize("fast", [True, False])
def test_only_intact_jpegs_of_usual_colours_may_be_decoded_in_part(fast, monkeypatch):
    if not fast:
        monkeypatch.setattr(decoding, "simplejpeg", None)
    image = Image.fromarray(photograph(20, 30, seed=11))
    data = encoded(image)
    assert jpeg_size(data) == jpeg_size(data + bytes(16)) == (20, 30)
    assert jpeg_size(encoded(image.convert("L"))) == (20, 30)
    others = [data[:-1], data[:-20], data + bytes(1000), b"", b"\xff\xd8\xff\xd9"]
    others += [encoded(image.convert("CMYK")), encoded(image, "PNG"), encoded(image, "GIF")]
    for other in others[: None if fast else -4]:
        assert jpeg_size(other) is None


@pytest.mark.parametrize(
    ("padding", "flip", "rotation"), [(4, True, 0), (4, True, 15), (0, False, 0)]
)
def test_padded_crops_are_torchvisions(padding, flip, rotation):
    pixels = photograph(32, 32, seed=9)
    steps = [torchvision.transforms.RandomCrop(32, padding=padding)]
    steps += [torchvision.transforms.RandomHorizontalFlip()] if flip else []
    steps += [torchvision.transforms.RandomRotation(rotation)] if rotation else []
    reference = torchvision.transforms.Compose(steps)
    ours = PaddedCrop(32, padding, flip, rotation)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = reference(torch.from_numpy(pixels).permute(2, 0, 1))
        assert torch.equal(transformed(ours, pixels, generator(seed)), expected)


def test_two_views_differ_and_depend_on_the_generator_alone():
    pixels, transform = photograph(64, 64, seed=10), TwoViews(32)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    views = transform(pixels, generator(1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(transform(pixels, generator(1)), views)
    assert views.shape == (2, 3, 32, 32)
    assert views.dtype == torch.uint8
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(transform(pixels, generator(2)), views)
    # The first view is always blurred, the second one in one of ten cases.
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    edges = [transform(noise, generator(s)).float().diff(dim=-1).abs().mean((1, 2, 3))
             for s in range(60)]  # fmt: skip
    first, second = torch.stack(edges).mean(0)
    assert first < 0.8 * second
