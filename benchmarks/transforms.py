"""Decoding and transforming images, by torchvision and by this project, as functions that are timed."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.pixels.boxes import CropFn, crop
from data.pixels.decode import decode, decode_pil
from data.pixels.transforms import TrainTransform, ValTransform
from data.sources.imagenet import ImageNet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def transform_variants(files: list[bytes], train: bool) -> dict[str, Callable[[], int]]:
    """Return decoding and transforming of all files, by torchvision and by us."""
    from torchvision import transforms as tv

    if train:
        steps = [tv.RandomResizedCrop(224), tv.RandomHorizontalFlip()]
        ours: Callable = TrainTransform(224)
        exact: Callable = TrainTransform(224, exact_pil=True)
    else:
        steps = [tv.Resize(256), tv.CenterCrop(224)]
        ours, exact = ValTransform(256, 224), ValTransform(256, 224, exact_pil=True)
    theirs = tv.Compose([*steps, tv.ToTensor(), tv.Normalize(MEAN, STD)])
    generator = torch.Generator()
    batch = torch.empty((len(files), 224, 224, 3), dtype=torch.uint8).permute(0, 3, 1, 2)

    def torchvision() -> int:
        for i, data in enumerate(files):
            torch.manual_seed(i)
            theirs(Image.open(io.BytesIO(data)).convert("RGB"))
        return len(files)

    def variant(decoder: Callable, transform: Callable) -> Callable[[], int]:
        def run() -> int:
            for i, data in enumerate(files):
                crop_fn = functools.partial(transform.box, generator=generator.manual_seed(i))
                batch[i].copy_(transform(decoder(data, crop_fn), generator))
            return len(files)

        return run

    def in_full(decoder: Callable) -> Callable:
        def decode_and_crop(data: bytes, crop_fn: CropFn) -> np.ndarray:
            pixels = decoder(data)
            return crop(pixels, crop_fn(*pixels.shape[:2]))

        return decode_and_crop

    return {
        "torchvision, PIL, float": torchvision,
        "ours, PIL decoder": variant(in_full(decode_pil), ours),
        "ours, full images decoded": variant(in_full(decode), ours),
        "ours": variant(decode, ours),
        "ours, --exact-pil": variant(decode, exact),
    }


# Flags of the source, and torchvision's transforms of images and of normalised floats.
AUGMENTATIONS: dict[str, tuple[dict[str, Any], Callable[[Any], tuple[list, list]]]] = {
    "crop and mirror only": ({}, lambda v2: ([], [])),
    "--auto-augment ra": (
        {"auto_augment": "ra"},
        lambda v2: ([v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR)], []),
    ),
    "--auto-augment ta": (
        {"auto_augment": "ta"},
        lambda v2: ([v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)], []),
    ),
    "--auto-augment aa": (
        {"auto_augment": "aa"},
        lambda v2: ([v2.AutoAugment(interpolation=v2.InterpolationMode.BILINEAR)], []),
    ),
    "--color-jitter 0.4": ({"color_jitter": 0.4}, lambda v2: ([v2.ColorJitter(0.4, 0.4, 0.4)], [])),
    "--random-erasing 0.25": ({"random_erasing": 0.25}, lambda v2: ([], [v2.RandomErasing(0.25)])),
}  # fmt: skip


def augmentation_variants(files: list[bytes], name: str) -> dict[str, Callable[[], int]]:
    """Return decoding, crop, mirror and one augmentation, by torchvision on PIL and on tensors and by us.

    torchvision's variants end with normalised floats, ours with uint8 pixels: the trainer normalises
    on its device.
    """
    from torchvision.transforms import v2

    flags, steps = AUGMENTATIONS[name]
    images, floats = steps(v2)
    crops = [v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()]
    ending = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD), *floats]
    theirs = {
        "torchvision v2, PIL": v2.Compose([*crops, *images, v2.PILToTensor(), *ending]),
        "torchvision v2, tensors": v2.Compose([v2.PILToTensor(), *crops, *images, *ending]),
    }
    generator = torch.Generator()
    ours = {
        "ours": ImageNet(**flags).train_transform(),
        "ours, --exact-pil": ImageNet(exact_pil=True, **flags).train_transform(),
    }
    batch = torch.empty((len(files), 224, 224, 3), dtype=torch.uint8).permute(0, 3, 1, 2)

    def torchvision(transform: Callable) -> int:
        for i, data in enumerate(files):
            torch.manual_seed(i)
            transform(Image.open(io.BytesIO(data)).convert("RGB"))
        return len(files)

    def own(transform: Any) -> int:
        for i, data in enumerate(files):
            crop_fn = functools.partial(transform.box, generator=generator.manual_seed(i))
            batch[i].copy_(transform(decode(data, crop_fn), generator))
        return len(files)

    return {
        **{label: functools.partial(torchvision, each) for label, each in theirs.items()},
        **{label: functools.partial(own, each) for label, each in ours.items()},
    }
