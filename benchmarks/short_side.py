"""What ``make_tfrecords --short-side`` changes: pixels, bytes, and images/s on one core.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.short_side

The images are generated ones of 500x375 pixels (data.synthetic's, with noise as from a sensor) and
scikit-learn's two photographs (640x427). Pixels are compared after the transforms, at the same
positions of the image: the mean of |difference| over all pixels, in units of 0..255.
"""

from __future__ import annotations

import argparse
import functools
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Generator, Tensor

from benchmarks.loader import interleaved, show
from data.make_tfrecords.shards import Conversion, convert
from data.pixels.boxes import Box
from data.pixels.decode import decode
from data.pixels.transforms import TrainTransform, ValTransform, resize
from data.synthetic import Jpegs

TRAIN, VAL = TrainTransform(224), ValTransform(256, 224)


def generated(count: int) -> list[bytes]:
    """Return generated JPEGs of ImageNet's usual size."""
    files = []
    for index in range(count):
        buffer = io.BytesIO()
        Jpegs(375, 500, grain=13.0, quality=92).draw([0, index]).save(buffer, "JPEG", quality=92)
        files.append(buffer.getvalue())
    return files


def photographs() -> list[bytes]:
    """Return two photographs."""
    from sklearn import datasets

    folder = Path(datasets.__file__).parent / "images"
    return [(folder / name).read_bytes() for name in ("china.jpg", "flower.jpg")]


def cropped(encoded: bytes, box: Box, of: tuple[int, int]) -> Tensor:
    """Return the training crop at a box that was drawn for the image at size (height, width) `of`."""
    pixels = decode(encoded)
    down, across = pixels.shape[0] / of[0], pixels.shape[1] / of[1]
    top, left = round(box[0] * down), round(box[1] * across)
    height, width = max(round(box[2] * down), 1), max(round(box[3] * across), 1)
    return resize(pixels[top : top + height, left : left + width], TRAIN.size, TRAIN.size)


def differences(files: list[bytes], smaller: list[bytes], boxes: int) -> tuple[float, float]:
    """Return the mean |difference| of training crops and of validation images, in units of 0..255."""
    train, val = [], []
    generator = Generator().manual_seed(0)
    for before, after in zip(files, smaller, strict=True):
        height, width = decode(before).shape[:2]
        for _ in range(boxes):
            box = TRAIN.box(height, width, generator)
            crops = [cropped(file, box, (height, width)).float() for file in (before, after)]
            train.append((crops[0] - crops[1]).abs().mean())
        images = [VAL(decode(file), generator).float() for file in (before, after)]
        val.append((images[0] - images[1]).abs().mean())
    return torch.stack(train).mean().item(), torch.stack(val).mean().item()


def through(files: list[bytes], transform: TrainTransform | ValTransform) -> Callable[[], int]:
    """Return a function that decodes and transforms all files."""

    def run() -> int:
        generator = Generator().manual_seed(0)
        crop_fn = functools.partial(transform.box, generator=generator)
        for file in files:
            transform(decode(file, crop_fn), generator)
        return len(files)

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short-side", type=int, nargs="+", default=[256, 320, 352])
    parser.add_argument("--quality", type=int, default=90)
    options = parser.parse_args()
    torch.set_num_threads(1)
    files, photos = generated(options.images), photographs()
    versions = {"unchanged": files}
    for side in options.short_side:
        conversion = Conversion(False, side, options.quality)
        smaller = [convert(file, conversion) for file in files]
        versions[f"--short-side {side} --quality {options.quality}"] = smaller
        print(
            f"--short-side {side}: {sum(map(len, smaller)) / sum(map(len, files)):.2f} of the bytes"
        )
        for name, before, after, boxes in (
            ("generated", files, smaller, 2),
            ("photographs", photos, [convert(file, conversion) for file in photos], 100),
        ):
            train, val = differences(before, after, boxes)
            print(f"    {name:12} training {train:.2f}, validation {val:.2f} of 255")
    for title, transform in (("training", TRAIN), ("validation", VAL)):
        variants = {name: through(version, transform) for name, version in versions.items()}
        show(title, interleaved(variants, options.rounds, time.process_time))


if __name__ == "__main__":
    main()
